// Answers questions in node, with the code of the page: one JSON object per line in, one per line out.
//
//     node ask.js < questions.jsonl
//
// A line in: {"question": ..., "rgb": base64 of red, green, blue of each pixel, "width": ..., "height": ...}; without a
// picture only the question. A line out: {"text": ..., "tokens": [...]}, and with "values": true in the question also
// the picture's prepared values, base64 of float32.

import { readFile } from 'node:fs/promises';
import { createInterface } from 'node:readline';
import * as library from '@huggingface/transformers';

import { answer, loadModel } from './answer.js';
import { preparePicture } from './picture.js';

const folder = new URL(process.argv[2] ? `file://${process.argv[2]}/` : './', import.meta.url);
library.env.allowRemoteModels = false;
library.env.localModelPath = folder.pathname;
const readJson = async (name) => JSON.parse(await readFile(new URL(`model/${name}`, folder)));
const loaded = await loadModel(library, 'model', readJson);
for await (const line of createInterface({ input: process.stdin })) {
  const { question, rgb, width, height, values } = JSON.parse(line);
  const picture = rgb ? { pixels: new Uint8ClampedArray(Buffer.from(rgb, 'base64')), width, height } : null;
  const found = await answer(loaded, question, picture);
  if (values) {
    const [prepared] = preparePicture(picture.pixels, width, height, loaded.pictures);
    found.values = Buffer.from(prepared.buffer).toString('base64');
  }
  console.log(JSON.stringify(found));
}
