#!/usr/bin/env bash
# The runs whose results docs/ quotes: benchmarks/published.sh FOLDER writes FOLDER/{main,long,million,heads,sparse}.json.
# About eight minutes on one H100 and 16 cores, half of them for compiling, ahead of all timing and in parallel.
# PEERS: a folder with fla-core and adasplash in it, for where installing them would replace torch.
set -uo pipefail
out=${1:?usage: benchmarks/published.sh FOLDER}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH=${PEERS:+$PEERS${PYTHONPATH:+:}}${PYTHONPATH:-}

lengths=(n=65536,k=1024,w=0 n=65536,k=512,w=512 n=4096,k=512,w=0 n=8192,k=512,w=0 n=16384,k=1024,w=0 n=32768,k=1024,w=0)
long=n=131072,k=1024,w=0
million=n=1048576,k=1024,w=0
heads=(n=32768,k=1024,w=0,hq=8 n=32768,k=1024,w=0,hq=16 n=32768,k=1024,w=0,hq=64,hkv=4
       n=32768,k=512,w=0,hq=12,hkv=12,d=64 n=32768,k=512,w=0,hq=16,hkv=16,d=64)
sparse=n=8192,k=512,w=512
dense=(--peer cudnn --peer flash --peer flex)

bench() { # SECONDS_IN_ALL OPTIONS...
    timeout "$1" sparsek-tune bench "${@:2}" || echo "sparsek-tune bench ${*:2}: exit code $?" >&2
}

compile() { # OPTIONS...: what such a run compiles lies in the caches afterwards
    bench 150 --seconds 0.01 "$@" > /dev/null 2>&1 & # what fails here fails again below, and says why
}

python3 examples/train_bytes.py --dim 1024 --steps 100 --log-every 50 \
    --record "$scratch/trained.pt" --record-length 65536 &
for shape in "${lengths[@]}" "$long"; do compile --shape "$shape" --peer flex; done
for shape in "${heads[@]}"; do compile --shape "$shape" --peer none; done
for peer in nsa adasplash; do compile --shape "$sparse" --peer "$peer"; done
wait
compile --shape "$million" --peer none --no-backward # by itself: it takes a good part of the memory
wait

bench 300 "${lengths[@]/#/--shape=}" --distribution iid --distribution slope --distribution trained \
    --recorded "$scratch/trained.pt" "${dense[@]}" --seconds 0.25 --json "$out/main.json"
bench 80 --shape "$long" --distribution iid --distribution slope "${dense[@]}" --seconds 0.25 --json "$out/long.json"
bench 60 --shape "$million" --peer none --no-backward --seconds 0.25 --json "$out/million.json"
bench 60 "${heads[@]/#/--shape=}" --peer none --seconds 0.25 --json "$out/heads.json"
bench 90 --shape "$sparse" --seconds 0.25 --json "$out/sparse.json"
