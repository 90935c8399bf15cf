#!/usr/bin/env bash
# Fetch what a bare GPU machine lacks into FOLDER (default .device), in portions below 60 MB.
#
#     benchmarks/device/fetch.sh [FOLDER] [MODEL_FOLDER]
#
# For Linux x86-64, Python 3.12 and torch 2.11 with CUDA 13; benchmarks/device.md says what the machine is expected to
# have. MODEL_FOLDER: a Hugging Face folder (SmolLM2-135M) for benchmarks/short_run.py, packed into portions, too.
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
engine_source=transformer-engine-torch==2.20.2 # compiled on the machine, against its torch

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

echo "fetching TransformerEngine (280 MB)"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
download "${binary[@]}" --dest "$scratch" "${engine_wheels[@]}"
download --no-binary=:all: --no-build-isolation --dest "$folder/engine" "$engine_source"
for wheel in "$scratch"/*.whl; do
  case $wheel in
    *cu13*) "$python" "$here/shrink_wheel.py" "$wheel" "$folder/engine/$(basename "$wheel")" ;;
    *) cp "$wheel" "$folder/engine/" ;;
  esac
done

if [[ -n $model ]]; then
  echo "packing $model"
  tar --create --directory "$model" . | split --bytes "$portion_size" --numeric-suffixes - "$folder/portions/model.tar."
  (cd "$folder/portions" && sha256sum model.tar.* >model.sha256)
fi
du -ah "$folder" | sort -k 2
