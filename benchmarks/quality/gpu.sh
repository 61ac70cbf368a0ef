#!/usr/bin/env bash
# Quality at equal cost on one GPU: tasks A, B and C in three processes that share it, so that compiling and calibrating
# overlap with training. Goes on from the settings that OUT has (else from those of benchmarks/results), so it may be
# called again; the most telling settings come first, and none begins that would not end in time.
#
#   bash benchmarks/quality/gpu.sh SECONDS OUT                  # OUT gets quality.csv, -details.jsonl, -settings.json, logs
#   cp OUT/quality* benchmarks/results/ && python -m benchmarks.quality update && python -m benchmarks.quality report
#
# From outside, if need be: MODEL, DATA (made by `prepare`), COMMIT, PYTHON; STEPS_A, STEPS_B, STEPS_C, ITEMS,
# and FLAGS for more options of `run` (rehearsal on a CPU: FLAGS="--seeds 2 --test 20 --batch-size 4").
set -u
LIMIT=$1 OUT=$2
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
MODEL=${MODEL:-/tmp/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf} DATA=${DATA:-$ROOT/.quality/data.npz}
COMMIT=${COMMIT:-$(git -C "$ROOT" rev-parse --short HEAD 2>/dev/null || echo unknown)}

mkdir -p "$OUT"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"  # where `-m benchmarks.quality` is found
if [ ! -e "$OUT/quality.csv" ]; then cp "$ROOT"/benchmarks/results/quality{.csv,-details.jsonl,-settings.json} "$OUT/"; fi

task() { # NAME STEPS SETTINGS
  timeout "$LIMIT" "${PYTHON:-python}" -u -m benchmarks.quality run --tasks "$1" --steps "$2" --settings "$3" \
    --items "${ITEMS:-3200}" --model "$MODEL" --data "$DATA" --commit "$COMMIT" --out "$OUT" \
    --seconds $((LIMIT - 8)) ${FLAGS---compile} >"$OUT/$1.log" 2>&1 &
}

# Done on A: every dense training, the default and rows-10-75, channels-50, random and random-rows-25-50.
task A "${STEPS_A:-900}" rows-10,rows-10-50
COMMON=dense,dense-50,default,default-50,dense-30,channels-50,dense-75,rows-10,random-rows-25-50,random,dense-65,default-75
task B "${STEPS_B:-400}" $COMMON,rows-10-50
task C "${STEPS_C:-300}" $COMMON,rows-10-50
wait
for name in A B C; do echo "== $name"; grep ' nll \|done\|ready\|spent\|trained with\|Error' "$OUT/$name.log" | tail -14; done
