#!/usr/bin/env bash
# On one GPU, in at most 8 minutes: the machine's roofs, kernels and library against fp64, then the CUDA suite.
#   OUT=benchmarks/results/h200 bash benchmarks/gpu.sh
# Everything ends up in $OUT and $OUT/loss; with PACK=1 in $OUT/results.tgz alone, written anew after each step, for machines
# from which few files come back. What runs kernels of our own has a process of its own or, in the suite, comes last: an illegal
# access ends a CUDA context, and takes with it whatever else would have been measured there.
# COMMIT names what runs where there is no .git; MINUTES and SECONDS_PER_GROUP bound the suite.
# Needs torch with CUDA, transformers, peft, pytest, hypothesis, tqdm and matplotlib; the library itself need not be installed.
# Optional baselines (liger-kernel, cut-cross-entropy) are installed from wheels/ where that folder holds them.
# Nothing that fails keeps the next step from running: the script goes on, and exits 1 at the end.
set -euo pipefail
: "${OUT:?name a folder for the results}"
cd "$(dirname "$0")/.."
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
PYTHON=${PYTHON:-python3}
SECONDS_PER_GROUP=${SECONDS_PER_GROUP:-1.5}
status=0
mkdir -p "$OUT"
found=$OUT
if [ "${PACK:-}" = 1 ]; then
    found=$(mktemp -d)
    trap 'rm -rf "$found"' EXIT
fi
mkdir -p "$found/loss"

step() {  # seconds, log, command: all that it prints is shown and kept
    local limit=$1 log=$2
    shift 2
    echo "== $log"
    timeout -k 5 "$limit" "$PYTHON" "$@" 2>&1 | tee "$found/$log" || status=1
    if [ "$found" != "$OUT" ]; then
        tar -czf "$OUT/results.part" -C "$found" . && mv "$OUT/results.part" "$OUT/results.tgz" || status=1
    fi
}

if compgen -G "wheels/*.whl" >/dev/null; then
    step 10 wheels.log -m pip install --quiet --no-index --no-deps --disable-pip-version-check wheels/*.whl
fi
step 25 roofs.txt -m benchmarks.roofs --device cuda
step 85 kernels.log -m pytest -v -p no:cacheprovider -k cuda tests/test_kernels.py
step 75 library.log -m pytest -v -p no:cacheprovider tests/test_cuda.py
step 165 suite.txt -m benchmarks --suite full --device cuda --bench lora decode encoder step --out "$found" \
    --seconds "$SECONDS_PER_GROUP" --minutes "${MINUTES:-2}"
step 75 loss/suite.txt -m benchmarks --suite full --device cuda --bench loss --out "$found/loss" --seconds "$SECONDS_PER_GROUP"
exit "$status"
