#!/usr/bin/env bash
# On one GPU, in at most 8 minutes: the library's tests, the CUDA suite, then the kernels' tests and the suite's loss bench.
#   OUT=benchmarks/results/h200 bash benchmarks/gpu.sh
# Everything ends up in $OUT and $OUT/loss (16 files at most). What runs kernels of our own comes last and in processes of its
# own: an illegal access ends a CUDA context, and takes with it whatever else would have been measured there.
# COMMIT names what runs where there is no .git; MINUTES and SECONDS_PER_GROUP bound the suite.
# Needs torch with CUDA, transformers, peft, pytest, hypothesis, tqdm and matplotlib; the library itself need not be installed.
# Optional baselines (liger-kernel, cut-cross-entropy) are installed from wheels/ where that folder holds them.
# Nothing that fails keeps the next step from running: the script goes on, and exits 1 at the end.
set -euo pipefail
: "${OUT:?name a folder for the results}"
cd "$(dirname "$0")/.."
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
PYTHON=${PYTHON:-python3}
status=0
mkdir -p "$OUT/loss"
progress=$(mktemp) || progress=/dev/null

if compgen -G "wheels/*.whl" >/dev/null; then
    timeout -k 10 10 "$PYTHON" -m pip install --quiet --no-index --no-deps --disable-pip-version-check wheels/*.whl || status=1
fi

echo "== the library on CUDA"
timeout -k 10 60 "$PYTHON" -m pytest -v -p no:cacheprovider tests/test_cuda.py 2>&1 | tee "$OUT/library.log" || status=1

echo "== suite"
timeout -k 10 180 "$PYTHON" -m benchmarks --suite full --device cuda --bench lora step decode encoder --out "$OUT" \
    --seconds "${SECONDS_PER_GROUP:-1.5}" --minutes "${MINUTES:-2}" 2>"$progress" | tee "$OUT/suite.txt" || status=1
tail -c 4000 "$progress" || status=1

echo "== kernels on CUDA"
timeout -k 10 80 "$PYTHON" -m pytest -v -p no:cacheprovider -k cuda tests/test_kernels.py 2>&1 | tee "$OUT/kernels.log" || status=1

echo "== suite: loss"
timeout -k 10 60 "$PYTHON" -m benchmarks --suite full --device cuda --bench loss --out "$OUT/loss" \
    --seconds "${SECONDS_PER_GROUP:-1.5}" 2>"$progress" | tee "$OUT/loss/suite.txt" || status=1
tail -c 4000 "$progress" || status=1

for folder in "$OUT" "$OUT/loss"; do  # cut short: pictures of what there is
    if [ ! -f "$folder/ratios.png" ]; then timeout -k 10 10 "$PYTHON" -m benchmarks show "$folder" || status=1; fi
done
exit "$status"
