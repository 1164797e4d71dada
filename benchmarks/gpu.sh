#!/usr/bin/env bash
# On one GPU, in at most 8 minutes: roofs, correctness, then the CUDA suite. Everything ends up in $OUT (8 files at most).
#   OUT=benchmarks/results/h200 bash benchmarks/gpu.sh
# COMMIT names what runs where there is no .git; MINUTES and SECONDS_PER_GROUP bound the suite.
# Needs torch with CUDA, transformers, peft, pytest and matplotlib; the library itself need not be installed. Optional
# baselines (liger-kernel, cut-cross-entropy) are installed from wheels/ where that folder holds them.
# A failed test does not keep the suite from being measured: the script goes on, and exits 1 at the end.
set -euo pipefail
: "${OUT:?name a folder for the results}"
cd "$(dirname "$0")/.."
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
PYTHON=${PYTHON:-python3}
status=0
mkdir -p "$OUT"

if compgen -G "wheels/*.whl" >/dev/null; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --disable-pip-version-check wheels/*.whl || echo "wheels not installed"
fi

echo "== roofs"
timeout 40 "$PYTHON" -m benchmarks.roofs --device cuda

echo "== correctness"
tests=(tests/test_cuda.py)
if [ -f tests/test_kernels.py ]; then tests=(tests/test_kernels.py "${tests[@]}"); fi
timeout 120 "$PYTHON" -m pytest -p no:cacheprovider -k cuda "${tests[@]}" 2>&1 | tee "$OUT/tests.log" || status=1

echo "== suite"
progress=$(mktemp)
timeout 300 "$PYTHON" -m benchmarks --suite full --device cuda --out "$OUT" --seconds "${SECONDS_PER_GROUP:-1.5}" \
    --minutes "${MINUTES:-4}" 2>"$progress" | tee "$OUT/suite.txt" || status=1
tail -c 600 "$progress"
if [ ! -f "$OUT/ratios.png" ]; then timeout 30 "$PYTHON" -m benchmarks show "$OUT" || status=1; fi  # cut short: what there is
exit "$status"
