#!/usr/bin/env bash
# Fetch what a bare GPU machine lacks into FOLDER (default .device), in portions below 60 MB.
#
#     benchmarks/device/fetch.sh [FOLDER] [MODEL_FOLDER]
#
# For Linux x86-64, Python 3.12 and torch 2.11 with CUDA 13; benchmarks/device.md says what the machine is expected to
# have. If PYTHON is a Python 3.12 with that torch, TransformerEngine's extension is compiled with it, for half an hour
# of a core; else TransformerEngine is left out. MODEL_FOLDER: a Hugging Face folder (SmolLM2-135M) for benchmarks/short_run.py, packed into portions, too.
set -euo pipefail

folder=${1:-.device}
model=${2:-}
here=$(dirname "$0")
python=${PYTHON:-python3}
portion_size=56M

wheels=(
  megatron-core==0.19.2
  pydantic==2.14.3
  pydantic-core==2.50.4
  annotated-types==0.8.0
  typing-inspection==0.4.5
  rapidfuzz==3.14.6
)
engine_wheels=(transformer-engine==2.20.2 transformer-engine-cu13==2.20.2)
engine_source=transformer-engine-torch==2.20.2 # compiled here, against the machine's release of torch

# pip matches platforms exactly: each tag that one of the wheels carries is named.
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014; do
  platforms+=(--platform "${tag}_x86_64")
done
download() {
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps "$@"
}

mkdir -p "$folder/wheels" "$folder/engine" "$folder/portions"
binary=(--only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}")
echo "fetching ${#wheels[@]} wheels"
download "${binary[@]}" --dest "$folder/wheels" "${wheels[@]}"

if "$python" -c 'import sys, torch; sys.exit((sys.version_info[:2], torch.__version__) != ((3, 12), "2.11.0+cu130"))'; then
  echo "fetching TransformerEngine (280 MB)"
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  download "${binary[@]}" --dest "$scratch" "${engine_wheels[@]}"
  for wheel in "$scratch"/*.whl; do
    case $wheel in
      *cu13*) "$python" "$here/shrink_wheel.py" "$wheel" "$folder/engine/$(basename "$wheel")" ;;
      *) cp "$wheel" "$folder/engine/" ;;
    esac
  done

  echo "compiling its extension for torch 2.11 (half an hour of a core)"
  # The headers of cuDNN and NCCL are in packages that torch brings; CUDA's are in CUDA_HOME.
  packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  cuda=${CUDA_HOME:-/usr/local/cuda}
  "$python" -m pip install --quiet --no-deps --target "$scratch/site" "$folder"/engine/*.whl "$folder"/wheels/pydantic*.whl
  CPATH=$packages/nvidia/cudnn/include:$packages/nvidia/nccl/include:$cuda/include:$packages/nvidia/cu13/include \
    PYTHONPATH=$scratch/site CUDA_HOME=$cuda NVTE_PYTORCH_FORCE_BUILD=TRUE \
    "$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$folder/engine" "$engine_source"
else
  echo "TransformerEngine left out: PYTHON=$python is not Python 3.12 with torch 2.11.0+cu130"
fi

if [[ -n $model ]]; then
  echo "packing $model"
  tar --create --directory "$model" . | split --bytes "$portion_size" --numeric-suffixes - "$folder/portions/model.tar."
  (cd "$folder/portions" && sha256sum model.tar.* >model.sha256)
fi
du -ah "$folder" | sort -k 2
