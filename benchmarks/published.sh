#!/usr/bin/env bash
# The runs whose results docs/ quotes: benchmarks/published.sh FOLDER [PART...] writes FOLDER/PART.json for each of the
# parts main, long, million, heads, sparse; all where none is named. Ends with 1 where a part failed or is not complete.
# Everything is compiled before anything is timed, in parallel: a quarter of an hour in all on one H100 and 32 cores.
# PEERS: a folder with fla-core and adasplash in it, for where installing them would replace torch.
# RECORDED: the file of a trained model's tensors that main needs; made where it does not exist.
set -uo pipefail
out=${1:?usage: benchmarks/published.sh FOLDER [main|long|million|heads|sparse]...}
parts=("${@:2}")
((${#parts[@]})) || parts=(main long million heads sparse)
mkdir -p "$out" || exit 2
out=$(realpath "$out")
scratch=$(mktemp -d)
trap 'kill $(jobs -p) 2> /dev/null; rm -rf "$scratch"' EXIT
recorded=$(realpath -m "${RECORDED:-$scratch/trained.pt}")
export PYTHONPATH=${PEERS:+$PEERS${PYTHONPATH:+:}}${PYTHONPATH:-}
cd "$(dirname "${BASH_SOURCE[0]}")/.."

declare -A shapes=(
    [main]="n=65536,k=1024,w=0 n=65536,k=512,w=512 n=4096,k=512,w=0 n=8192,k=512,w=0 n=16384,k=1024,w=0 n=32768,k=1024,w=0"
    [long]="n=131072,k=1024,w=0"
    [million]="n=1048576,k=1024,w=0"
    [heads]="n=32768,k=1024,w=0,hq=8 n=32768,k=1024,w=0,hq=16 n=32768,k=1024,w=0,hq=64,hkv=4
        n=32768,k=1024,w=0,hq=12,hkv=12,d=64 n=32768,k=512,w=0,hq=16,hkv=16,d=64"
    [sparse]="n=8192,k=512,w=512"
)
dense="--peer cudnn --peer flash --peer flex"
declare -A options=(
    [main]="--distribution iid --distribution slope --distribution trained $dense"
    [long]="--distribution iid --distribution slope $dense"
    [million]="--peer none --no-backward"
    [heads]="--peer none"
    [sparse]=""
)
# What compiles: the dense peers do not.
declare -A compiled=([main]="--peer flex" [long]="--peer flex" [million]="--peer none --no-backward" [heads]="--peer none"
    [sparse]="--peer flex")
failed=0

bench() { # SECONDS_IN_ALL OPTIONS...
    timeout "$1" sparsek-tune bench "${@:2}" && return
    echo "sparsek-tune bench ${*:2}: exit code $?" >&2
    failed=1
}

compile() { # PART: what such a run compiles lies in the caches afterwards, as far as it comes in this time
    local shape share
    for shape in ${shapes[$1]}; do
        bench 150 --seconds 0.01 --shape "$shape" ${compiled[$1]} > /dev/null 2>&1 &
    done
    [[ $1 == sparse ]] || return 0
    for ((share = 0; share < 16; share++)); do # one of these peers tries 60 configs a kernel
        timeout 200 python3 benchmarks/compile_share.py "$share" 16 bench --seconds 0.01 \
            --shape "${shapes[sparse]}" --peer nsa --peer adasplash > /dev/null 2>&1 &
    done
}

for part in "${parts[@]}"; do
    if [[ ! -v shapes[$part] ]]; then
        echo "unknown part $part: main, long, million, heads or sparse" >&2
        exit 2
    fi
    rm -f "$out/$part.json"
done

if [[ " ${parts[*]} " == *" main "* && ! -e $recorded ]]; then
    python3 examples/train_bytes.py --dim 1024 --steps 100 --log-every 50 --record "$recorded.part" \
        --record-length 65536 && mv "$recorded.part" "$recorded" &
fi
for part in "${parts[@]}"; do
    [[ $part == million ]] || compile "$part"
done
wait
if [[ " ${parts[*]} " == *" million "* ]]; then # takes a good part of the memory: by itself
    compile million
    wait
fi
for part in "${parts[@]}"; do
    echo "$part: starts after $SECONDS s"
    arguments=(--seconds 0.25 --json "$out/$part.json" ${options[$part]})
    for shape in ${shapes[$part]}; do
        arguments+=(--shape "$shape")
    done
    [[ $part == main ]] && arguments+=(--recorded "$recorded")
    bench 600 "${arguments[@]}"
done
echo "ended after $SECONDS s"
exit $failed
