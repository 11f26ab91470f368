"""A model of lmms-eval: `lmms_eval --model convllava --model_args pretrained=PATH --tasks TASK --batch_size 8`.

lmms-eval finds it by the entry-point group `lmms_eval.models`; installing this package beside it is all it takes. It
serves ConvLLaVA and the converted models of the LLaVA family.
"""

import re
from collections import defaultdict

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import eval_logger
from PIL import ImageFile
from tqdm import tqdm

from ..inference.load import load
from ..registration import register
from .answering import make_local_answerer
from .grounding import PROMPT, parse_box, place_box
from .questions import PROMPT_STYLES, Question


# How its RefCOCO tasks end their prompt; what stands before describes boxes of the image without padding.
DESCRIBED = re.compile(r"region this sentence describes: (.*?)\.?\s*$", re.DOTALL)


# How an answer begins that is none.
UNREAD = "[CONVLLAVA_IMAGE_UNREADABLE]"


def describe() -> ModelManifest:
    return ModelManifest("convllava", chat_class_path=f"{__name__}.ConvLlavaEval")


class ConvLlavaEval(lmms):
    """Answers in batches, greedily unless a task says otherwise.

    Args:
        pretrained: checkpoint, a Hub id or a path.
        batch_size: questions at a time.
        device, dtype, trust_remote_code: see `load`.
        max_image_tokens: most tokens of an image.
        prompt_style: one of `PROMPT_STYLES`.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        max_image_tokens: int | None = None,
        prompt_style: str = "checkpoint",
        trust_remote_code: bool = False,
        skip_bad_images: bool = False,
        **_,
    ):
        super().__init__()
        register()
        place = device if device and ":" in device else None  # lmms-eval says "cuda" where none was asked for
        place = "cpu" if device == "cpu" else place
        self.loaded = load(pretrained, place, dtype, trust_remote_code=bool(trust_remote_code))
        self.batch_size_per_gpu, self.style = int(batch_size), PROMPT_STYLES[prompt_style]
        self.max_image_tokens = max_image_tokens and int(max_image_tokens)
        self.skip_bad_images = bool(skip_bad_images)

    def generate_until(self, requests) -> list[str]:
        """Answers to chat requests, in their order.

        RefCOCO is asked with the prompt of the training, and boxes come back as fractions of the unpadded image, which
        is what these tasks compare. A question whose image cannot be read is named in the log.

        Raises:
            ValueError: there are such questions, and `skip_bad_images` was not set; else their answer is `UNREAD`.
        """
        filled, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False  # lmms-eval fills with grey
        try:
            return self._answer_all(requests)
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = filled

    def _answer_all(self, requests) -> list[str]:
        groups, unread = defaultdict(list), {}
        for index, request in enumerate(requests):
            _, make_messages, options, doc_id, task, split = request.args
            try:
                chat = ChatMessages(messages=make_messages(self.task_dict[task][split][doc_id]))
            except OSError as error:  # an image that is missing or broken, which the task opens
                unread[index] = error
                continue
            images = chat.extract_media()[0]
            text = "\n".join(
                part.text for turn in chat.messages for part in turn.content if part.type == "text"
            ).strip()
            boxed = "bbox_rec" in task and DESCRIBED.search(text)
            text = PROMPT.format(boxed[1]) if boxed else text
            size = images[0].size if images else (0, 0)
            settings = (options.get("max_new_tokens", 128), float(options.get("temperature") or 0))
            groups[settings, size, len(images)].append((index, text, images, size if boxed else None, options))
        answers = [""] * len(requests)
        progress = tqdm(total=len(requests), unit=" samples", disable=self.rank > 0)
        for (settings, _, _), members in groups.items():
            chosen = {"temperature": settings[1], "max_image_tokens": self.max_image_tokens}
            answer_batch = make_local_answerer(*self.loaded, None, self.style, settings[0], chosen)
            for start in range(0, len(members), self.batch_size_per_gpu):
                batch = members[start : start + self.batch_size_per_gpu]
                found = answer_batch([Question(index, text, text, images) for index, text, images, _, _ in batch])
                for (index, _, _, size, options), answer in zip(batch, found, strict=True):
                    if isinstance(answer, Exception):
                        unread[index] = answer
                        continue
                    for stop in options.get("until") or []:
                        answer = answer.split(stop)[0] if stop else answer
                    answers[index] = convert_box(answer, *size) if size else answer
                progress.update(len(batch))
        progress.close()
        for index, error in sorted(unread.items()):
            answers[index] = UNREAD  # without the reason, in which a task might find its answer
            eval_logger.error(f"No answer to question {requests[index].args[3]} of {requests[index].args[4]}: {error}")
        if unread and not self.skip_bad_images:
            raise ValueError(
                f"{len(unread)} of {len(requests)} questions have no answer, as their images cannot be read. "
                f"lmms-eval knows no missing answers; skip_bad_images=True scores them as {UNREAD}."
            )
        return answers

    def loglikelihood(self, requests):
        raise NotImplementedError("tasks that compare likelihoods are not supported; take one that generates.")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("tasks of several rounds are not supported.")


def convert_box(answer: str, width: int, height: int) -> str:
    """A box on the padded square as one on the image, in fractions. What the original cannot read stays unreadable."""
    box = parse_box(answer)
    if box is None:
        return answer.replace("[", "(")
    placed = place_box(box, height, width) / [width, height, width, height]
    return str([round(float(value), 4) for value in placed])
