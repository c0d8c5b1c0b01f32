#!/usr/bin/env bash
# All that needs a GPU, in one go and in less than 10 minutes on an H200: builds csrc, runs the GPU tests, training
# steps within the cards they stand for, the head benchmark and the sanitizers. Needs only a CUDA PyTorch image (torch,
# triton, transformers, pytest, pybind11, cmake, ninja, rich; nvcc) and installs nothing: what trains full 8B models
# also needs torchao, LoRA peft, and peers are compared where `import trl`, `liger_kernel`, `cut_cross_entropy` work.
#
#   PYTHON  python3        OUT  bench/results        SECONDS_IN_ALL  570
#   PARTS   build tests train head sanitizers: what runs, in this order, the most telling first. Not all of it fits the
#           time: a second command with PARTS="build train head sanitizers" goes on where the first one's rows end.
#
# Writes OUT/<date>-<device>-train.json and -head.json (rows as bench/README.md says; the same revision goes on in the
# same file), their plots in OUT/plots where matplotlib is installed, and OUT/<date>-<device>-gpu-check.log.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} OUT=${OUT:-bench/results} SECONDS_IN_ALL=${SECONDS_IN_ALL:-570}
PARTS=${PARTS:-build tests train head sanitizers}
SECONDS=0 failed=()

for part in $PARTS; do
    case $part in
    build | tests | train | head | sanitizers) ;;
    *)
        echo "gpu-check: PARTS has $part; it takes build, tests, train, head, sanitizers" >&2
        exit 2
        ;;
    esac
done
device=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
if [ -z "$device" ]; then
    echo "gpu-check: nvidia-smi names no GPU here; it takes a machine with an NVIDIA GPU" >&2
    exit 2
fi
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
mkdir -p "$OUT"
name="$OUT/$(date +%F)-$(echo "$device" | tr 'A-Z ' 'a-z-' | tr -cd 'a-z0-9-')-gpu-check"
exec > >(tee "$name.log") 2>&1

step() { # title, seconds at most, command ...
    local title=$1 most=$2 start=$SECONDS
    shift 2
    if [ "$most" -lt 10 ]; then
        echo "== $title: left out, no time is left"
        return
    fi
    echo "== $title"
    timeout --kill-after=10 "$most" "$@" || failed+=("$title")
    echo "== $title: $((SECONDS - start)) s"
}
left() { # seconds left, but no more than $1 and no fewer than 1
    local left=$((SECONDS_IN_ALL - SECONDS))
    left=$((left < $1 ? left : $1))
    echo $((left > 1 ? left : 1))
}
bench() { # command, seconds: it ends by itself shortly before them
    local most=$(left "$2")
    step "$1" "$most" "$PYTHON" -m bench "$1" --device cuda --output "$OUT" --seconds $((most > 30 ? most - 25 : 5))
}
tests="$PYTHON -m pytest -m gpu -q -p no:cacheprovider"

nvidia-smi
for part in $PARTS; do
    case $part in
    build)
        suffix=$([ "$capability" -ge 90 ] && echo a)
        FASTPREF_CUDA=ON CUDAARCHS="$capability$suffix-real" step build "$(left 150)" \
            "$PYTHON" setup.py --quiet build_ext --inplace
        ;;
    tests)
        step tests "$(left 130)" $tests tests/test_head_gpu.py tests/rows tests/test_attention.py \
            tests/train/test_optim_gpu.py tests/train/test_kernels.py
        ;;
    # Their cells stand in the order of their importance.
    train) bench train 250 ;;
    head) bench head 150 ;;
    sanitizers)
        if ! command -v compute-sanitizer >/dev/null; then
            echo "== compute-sanitizer is not on PATH: memcheck and racecheck left out"
            continue
        fi
        for tool in memcheck racecheck; do
            step "$tool" "$(left 45)" compute-sanitizer --tool "$tool" --error-exitcode 3 --launch-timeout 30 \
                $tests tests/rows/test_cuda_gpu.py -k "in_place or narrower"
        done
        ;;
    esac
done

echo "gpu-check: $SECONDS s; rows as said above, $name.log"
if [ ${#failed[@]} -gt 0 ]; then
    echo "gpu-check: failed: ${failed[*]}"
    exit 1
fi
