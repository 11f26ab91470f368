#!/usr/bin/env bash
# The whole recipe on a tiny model: two parts joined, then stages 1, 2 and 3, each with `convllava train`. No download.
#
#   examples/three_stages.sh OUTPUT
#
# On your own data: build it with `convllava data build`, start from `convllava init` on real parts, leave out the
# settings in TINY, and take the recipes convllava_stage1, 2 and 3.
set -euo pipefail
output=${1:?name a folder to write to}
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}

$python "$here/build_your_own.py" --output "$output/start"
$python "$here/build_dataset.py" --output "$output/data"

TINY="--max_steps 8 --per_device_train_batch_size 4 --warmup_steps 1"
model=$output/start
for stage in 1 2 3; do
    convllava plan "$model" --stage $stage
    convllava train tiny_cpu_stage$stage --model_name_or_path "$model" --dataset_name "$output/data" \
        --output_dir "$output/stage$stage" $TINY
    model=$output/stage$stage
done
echo "the model: $model, its curves: $model/training_curves.png"
