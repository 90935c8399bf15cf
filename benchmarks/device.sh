#!/usr/bin/env bash
# Measure the platform on one GPU in nine minutes: ceilings, GPU tests, attention, MFU, a short run, TransformerEngine.
#
#     benchmarks/device.sh [FOLDER]
#
# From the repository's root. FOLDER (default .device) holds what benchmarks/device/fetch.sh brought; without it, the
# packages of $PYTHON are used. benchmarks/device.md explains the steps and the lines of the table.
#
#     OUT      where results go (default: device-results); afterwards it holds no more than
#              table.md, results.jsonl, steps.tsv, log.txt, short_run.tar.gz and trace.json.gz
#     PYTHON   the interpreter (default: python3)
#     SECONDS_IN_ALL   no step starts after this many seconds, and none outlasts them (default: 540)
#     STEPS    names of the steps to run, for another look at some (default: all; the installation and versions always run)
#
# Every step has a limit, and a failed one stops nothing. On a machine without a GPU the same steps run at tiny sizes,
# with four times the limits; one that needs a GPU says so in a line.
set -uo pipefail # not -e: see above

folder=${1:-.device}
out=${OUT:-device-results}
python=${PYTHON:-python3}
seconds_in_all=${SECONDS_IN_ALL:-540}
slowness=1

mkdir -p "$out"
out=$(realpath "$out")
scratch=$(mktemp -d)
running=
trap 'rm -rf "$scratch"' EXIT
trap '[[ -z $running ]] || { kill "$running"; wait "$running"; } 2>/dev/null; exit 130' INT TERM
rm -f "$out"/{table.md,results.jsonl,steps.tsv,log.txt,short_run.tar.gz,trace.json.gz}
touch "$out"/{results.jsonl,steps.tsv,log.txt}

install=("$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile)
export PYTHONPATH=$scratch/site:$PWD/platform:$PWD
export PYTHONUNBUFFERED=1
export MPLCONFIGDIR=$scratch/matplotlib

is_wanted() { [[ -z ${STEPS:-} || " install versions engine_install $STEPS " == *" $1 "* ]]; }

# step NAME LIMIT COMMAND...: run the command for at most LIMIT seconds, keep its log, its JSON lines and its exit code.
step() {
  local name=$1 limit=$(($2 * slowness)) start=$SECONDS left=$((seconds_in_all * slowness - SECONDS))
  shift 2
  is_wanted "$name" || return 0
  if ((left < 5)); then
    printf '%s\t-\t0\tno time left\n' "$name" | tee -a "$out/steps.tsv"
    return 1
  fi
  ((limit < left)) || limit=$left

  echo "--- $name (at most $limit s)"
  # In the background, so that a signal to this script is handled at once; `timeout` passes it on to the command.
  timeout --signal INT --kill-after 5 "$limit" "$@" >"$scratch/$name.log" 2>&1 &
  running=$!
  wait "$running"
  local status=$?
  { echo "=== $name: exit code $status after $((SECONDS - start)) s"; cat "$scratch/$name.log"; } >>"$out/log.txt"
  grep '^{"benchmark"' "$scratch/$name.log" >>"$out/results.jsonl"
  local last_line
  last_line=$(grep -v '^{' "$scratch/$name.log" | tail -n 1 | tr '\t' ' ' | cut -c 1-300)
  printf '%s\t%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - start))" "$last_line" | tee -a "$out/steps.tsv"
  return "$status"
}

if ls "$folder"/wheels/*.whl >/dev/null 2>&1; then
  step install 60 "${install[@]}" --no-index --target "$scratch/site" "$folder"/wheels/*.whl
fi
step versions 60 "$python" benchmarks/device/versions.py
has_gpu=false
grep -q '"gpu": true' "$out/results.jsonl" && has_gpu=true
if ! $has_gpu; then
  slowness=4
  export UL2R_GPU_TESTS_DEVICE=cpu # the GPU tests have a form for CPUs
fi
gpu=(step)
$has_gpu || gpu=(needs_gpu)
needs_gpu() { is_wanted "$1" && printf '%s\t-\t0\tneeds a GPU\n' "$1" | tee -a "$out/steps.tsv"; }

step ceilings 30 "$python" benchmarks/ceilings.py

# pytest's settings turn warnings into errors; those of other releases of torch and transformers are not ours to judge.
# -v: a test that does not end is known by name.
pytest=("$python" -m pytest -v -o filterwarnings=default -p no:cacheprovider)
"$python" -c 'import xdist' 2>/dev/null && pytest+=(-n "$(($(nproc) < 4 ? $(nproc) : 4))")
step tests 150 "${pytest[@]}" tests/gpu
step mfu_1b 120 "$python" benchmarks/mfu.py $($has_gpu && echo --models 1b) --arms prefix causal
step trace 60 "$python" benchmarks/mfu.py $($has_gpu && echo --models 1b --lengths 2048 || echo --lengths 128) --arms prefix --trace "$scratch/trace.json.gz"
step attention 90 "$python" benchmarks/attention.py
step short_run 150 "$python" benchmarks/short_run.py $($has_gpu && echo --tokens 8000000) --output "$scratch/short_run"

if ls "$folder"/portions/model.tar.* >/dev/null 2>&1; then
  mkdir -p "$scratch/model"
  step model 60 bash -c 'cd "$1" && sha256sum --quiet --check model.sha256 && cat model.tar.* | tar --extract --directory "$2"' \
    - "$folder/portions" "$scratch/model" &&
    step short_run_hf 150 "$python" benchmarks/short_run.py $($has_gpu && echo --tokens 4000000) --hf "$scratch/model" --output "$scratch/short_run_hf"
fi

"${gpu[@]}" mfu_3b 60 "$python" benchmarks/mfu.py --models 3b --lengths 2048 --arms prefix causal

# TransformerEngine in a folder of its own, so that the steps above do without it.
if ls "$folder"/engine/*.whl >/dev/null 2>&1; then
  step engine_install 60 "${install[@]}" --no-index --target "$scratch/engine" "$folder"/engine/*.whl
  export PYTHONPATH=$scratch/engine:$PYTHONPATH
  step engine 60 "$python" -c 'import torch, transformer_engine.pytorch as te; print("TransformerEngine", te.__file__)' &&
    "${gpu[@]}" engine_tests 100 "${pytest[@]}" tests/gpu -k 'engine or kernels' &&
    "${gpu[@]}" engine_mfu 100 "$python" benchmarks/mfu.py --models 1b --lengths 2048 --attention te --arms prefix fp8 &&
    "${gpu[@]}" engine_attention 60 "$python" benchmarks/attention.py
else
  printf 'engine\t-\t0\tnothing in %s/engine\n' "$folder" | tee -a "$out/steps.tsv"
fi

[[ -f $scratch/trace.json.gz ]] && cp "$scratch/trace.json.gz" "$out/"
reports=$(cd "$scratch" && find short_run* -maxdepth 1 -type f 2>/dev/null)
[[ -n $reports ]] && tar --create --gzip --file "$out/short_run.tar.gz" --directory "$scratch" $reports
"$python" benchmarks/device/table.py "$out" | tee "$out/table.md"
