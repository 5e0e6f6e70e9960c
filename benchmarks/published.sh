#!/usr/bin/env bash
# The runs whose results docs/ quotes: benchmarks/published.sh FOLDER [PART...] writes FOLDER/PART.json for each of the
# parts main, long, million, heads, sparse; all where none is named. About twenty minutes in all on one H100 and 16 cores,
# more than half of them for compiling, ahead of all timing and in parallel.
# PEERS: a folder with fla-core and adasplash in it, for where installing them would replace torch.
# RECORDED: the file of a trained model's tensors that main needs; made where it does not exist.
set -uo pipefail
out=${1:?usage: benchmarks/published.sh FOLDER [main|long|million|heads|sparse]...}
parts=("${@:2}")
((${#parts[@]})) || parts=(main long million heads sparse)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
recorded=${RECORDED:-$scratch/trained.pt}
export PYTHONPATH=${PEERS:+$PEERS${PYTHONPATH:+:}}${PYTHONPATH:-}

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
    [main]="--distribution iid --distribution slope --distribution trained --recorded $recorded $dense"
    [long]="--distribution iid --distribution slope $dense"
    [million]="--peer none --no-backward"
    [heads]="--peer none"
    [sparse]=""
)
declare -A compiled=([main]="--peer flex" [long]="--peer flex" [million]="--peer none --no-backward" [heads]="--peer none")

bench() { # SECONDS_IN_ALL OPTIONS...
    timeout "$1" sparsek-tune bench "${@:2}" || echo "sparsek-tune bench ${*:2}: exit code $?" >&2
}

compile() { # PART OPTIONS...: what such a run compiles lies in the caches afterwards; what fails fails again below
    for shape in ${shapes[$1]}; do
        bench 150 --seconds 0.01 --shape "$shape" "${@:2}" > /dev/null 2>&1 &
    done
}

for part in "${parts[@]}"; do
    if [[ ! -v shapes[$part] ]]; then
        echo "unknown part $part: main, long, million, heads or sparse" >&2
        exit 2
    fi
done

for part in "${parts[@]}"; do
    case $part in
    main)
        if [[ ! -e $recorded ]]; then
            python3 examples/train_bytes.py --dim 1024 --steps 100 --log-every 50 --record "$recorded" \
                --record-length 65536 &
        fi
        compile main ${compiled[main]}
        ;;
    sparse) # one of these peers tries 60 configs a kernel
        for ((share = 0; share < 16; share++)); do
            timeout 200 python3 "${0%/*}/compile_share.py" "$share" 16 bench --seconds 0.01 \
                --shape "${shapes[sparse]}" --peer nsa --peer adasplash > /dev/null 2>&1 &
        done
        bench 150 --seconds 0.01 --shape "${shapes[sparse]}" --peer flex > /dev/null 2>&1 &
        ;;
    million) ;; # takes a good part of the memory: by itself, below
    *) compile "$part" ${compiled[$part]} ;;
    esac
done
wait
if [[ " ${parts[*]} " == *" million "* ]]; then
    compile million ${compiled[million]}
    wait
fi
for part in "${parts[@]}"; do
    echo "$part: starts after $SECONDS s"
    read -ra all <<< "${shapes[$part]//$'\n'/ }"
    bench 600 "${all[@]/#/--shape=}" --seconds 0.25 --json "$out/$part.json" ${options[$part]}
done
echo "ended after $SECONDS s"
