#!/usr/bin/env bash
# The whole recipe on a tiny model: data, two parts joined, then stages 1, 2 and 3. About a minute on a CPU, no download.
#
#   examples/three_stages.sh OUTPUT
#
# For a real run, replace the drawn pictures by your own JSON and images (or a mixture: `convllava data build --help`), the
# tiny parts by `convllava init` on real ones, and the recipes by convllava_stage1, 2 and 3 without the settings in TINY.
set -euo pipefail
output=${1:?name a folder to write to}
here=$(cd "$(dirname "$0")" && pwd)
PYTHON=${PYTHON:-python}

$PYTHON - "$output/raw" <<'PY'
import json
import sys
from pathlib import Path

from PIL import Image

folder, rows = Path(sys.argv[1]), []
folder.mkdir(parents=True)
for index, colour in enumerate(["red", "green", "blue", "black"] * 8):
    Image.new("RGB", (200 + 3 * index, 150), colour).save(folder / f"{index}.png")
    question = {"from": "human", "value": "<image>\nWhat colour is it?"}
    turns = [question, {"from": "gpt", "value": f"It is {colour}."}]
    rows.append({"id": str(index), "image": f"{index}.png", "conversations": turns})
(folder / "rows.json").write_text(json.dumps(rows))
PY
convllava data build --llava-json "$output/raw/rows.json" --image-root "$output/raw" --output "$output/data"
$PYTHON "$here/build_your_own.py" --output "$output/start"
convllava plan "$output/start" --stage 2

TINY="--max_steps 8 --per_device_train_batch_size 4 --warmup_steps 1 --save_strategy no"
model=$output/start
for stage in 1 2 3; do
    convllava train tiny_cpu_stage$stage --model_name_or_path "$model" --dataset_name "$output/data" \
        --output_dir "$output/stage$stage" $TINY
    model=$output/stage$stage
done
echo "the model: $model, its curves: $model/training_curves.png"
