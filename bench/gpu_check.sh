#!/usr/bin/env bash
# All that needs a GPU, in one go and in at most 8 minutes on an H200: builds csrc, runs the GPU tests, the sanitizers and
# the head benchmark. Needs only a CUDA PyTorch image (torch, triton, pytest, pybind11, cmake, ninja, rich; nvcc) and
# installs nothing. Peers are compared where `import trl`, `liger_kernel`, `cut_cross_entropy` work.
#
#   PYTHON  python3        OUT  bench/results        SECONDS_IN_ALL  470
#
# Writes OUT/<date>-<device>-head.json (rows as bench/README.md says; the same revision goes on in the same file), its
# plots in OUT/plots where matplotlib is installed, and OUT/<date>-<device>-head.log.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} OUT=${OUT:-bench/results} SECONDS_IN_ALL=${SECONDS_IN_ALL:-470}
SECONDS=0 failed=()

device=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
if [ -z "$device" ]; then
    echo "gpu-check: nvidia-smi names no GPU here; it takes a machine with an NVIDIA GPU" >&2
    exit 2
fi
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
mkdir -p "$OUT"
name="$OUT/$(date +%F)-$(echo "$device" | tr 'A-Z ' 'a-z-' | tr -cd 'a-z0-9-')-head"
exec > >(tee "$name.log") 2>&1

step() { # title, seconds at most, command ...
    local title=$1 most=$2 start=$SECONDS
    shift 2
    echo "== $title"
    timeout --kill-after=10 "$most" "$@" || failed+=("$title")
    echo "== $title: $((SECONDS - start)) s"
}
left() { # seconds left, but no more than $1
    local left=$((SECONDS_IN_ALL - SECONDS))
    echo $((left < $1 ? (left > 1 ? left : 1) : $1))
}

nvidia-smi
suffix=$([ "$capability" -ge 90 ] && echo a)
FASTPREF_CUDA=ON CUDAARCHS="$capability$suffix-real" step build 150 "$PYTHON" setup.py --quiet build_ext --inplace
tests="$PYTHON -m pytest -m gpu -q -p no:cacheprovider"
step tests "$(left 200)" $tests tests/test_head_gpu.py tests/rows tests/test_attention.py tests/train/test_optim_gpu.py \
    tests/train/test_kernels.py
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        step "$tool" "$(left 45)" compute-sanitizer --tool "$tool" --error-exitcode 3 --launch-timeout 30 \
            $tests tests/rows/test_cuda_gpu.py -k "in_place or narrower"
    done
else
    echo "== compute-sanitizer is not on PATH: memcheck and racecheck left out"
fi
# Its cells stand in the order of their importance; what the time does not reach is recorded as skipped.
step benchmark "$(left 470)" "$PYTHON" -m bench head --device cuda --output "$OUT" --seconds "$(($(left 470) - 25))"

echo "gpu-check: $SECONDS s; rows as said above, $name.log"
if [ ${#failed[@]} -gt 0 ]; then
    echo "gpu-check: failed: ${failed[*]}"
    exit 1
fi
