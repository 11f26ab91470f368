// Loads what `convllava export --to web` wrote and answers with it, in a page or in node.

import { preparePicture } from './picture.js';

/**
 * @param {object} library the module @huggingface/transformers
 * @param {string} name of the model, below `env.localModelPath`
 * @param {(name: string) => Promise<object>} readJson reads a file of the model
 * @param {(progress: object) => void} [onProgress] hears about files that load
 */
export async function loadModel(library, name, readJson, onProgress) {
  const [config, processor, pictures] = await Promise.all(
    ['config.json', 'processor_config.json', 'preprocessor_config.json'].map(readJson),
  );
  const options = { dtype: config['transformers.js_config'].dtype, progress_callback: onProgress };
  const device = typeof window === 'undefined' ? 'cpu' : 'wasm';
  const tokenizer = await library.AutoTokenizer.from_pretrained(name);
  const model = await library.LlavaForConditionalGeneration.from_pretrained(name, { ...options, device });
  return { library, model, tokenizer, config, processor, pictures };
}

/**
 * @param {object} loaded from loadModel
 * @param {string} question
 * @param {{pixels: Uint8ClampedArray, width: number, height: number} | null} picture red, green, blue of each pixel
 * @param {{maxNewTokens?: number, onText?: (piece: string) => void}} [options]
 * @returns {Promise<{text: string, tokens: number[]}>} the answer, and its tokens with the one that ends it
 */
export async function answer(loaded, question, picture, { maxNewTokens = 512, onText } = {}) {
  const { library, model, tokenizer, processor } = loaded;
  const image = processor.image_token ?? '<image>';
  const content = [...(picture ? [{ type: 'image' }] : []), { type: 'text', text: question }];
  let text = tokenizer.apply_chat_template([{ role: 'user', content }], {
    tokenize: false,
    add_generation_prompt: true,
  });
  const inputs = {};
  if (picture) {
    const [values, shape] = preparePicture(picture.pixels, picture.width, picture.height, loaded.pictures);
    inputs.pixel_values = new library.Tensor('float32', values, shape);
    const cells = shape.slice(2).map((side) => Math.floor(side / processor.patch_size));
    let count = cells[0] * cells[1] + (processor.num_additional_image_tokens ?? 0);
    if (processor.vision_feature_select_strategy === 'default') count -= 1; // the class token is left out
    const [before, after] = text.split(image);
    // The original LLaVA tokenises what follows a picture on its own, with SentencePiece's leading space.
    const space = processor.chunk_prefix_space && after.length ? ' ' : '';
    text = before + image.repeat(count) + space + after;
  }
  Object.assign(inputs, tokenizer(text, { add_special_tokens: loaded.config.add_special_tokens ?? true }));
  const streamer =
    onText &&
    new library.TextStreamer(tokenizer, { skip_prompt: true, skip_special_tokens: true, callback_function: onText });
  const output = await model.generate({ ...inputs, max_new_tokens: maxNewTokens, do_sample: false, streamer });
  const length = inputs.input_ids.dims[1];
  const tokens = Array.from(output[0].data, Number).slice(length);
  return { text: tokenizer.decode(tokens, { skip_special_tokens: true }).trim(), tokens };
}
