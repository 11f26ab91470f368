"""transformers' common test suites on our processor and image processors; see `transformers_suite`."""

import unittest
from importlib.resources import files
from pathlib import Path

from PIL import Image
from tiny_checkpoint import build_tokenizer
from transformers import LlamaTokenizer
from transformers_suite import import_suite

from convllava_hf import ConvLlavaImageProcessor, ConvLlavaImageProcessorPil, ConvLlavaProcessor


image_suite = import_suite("test_image_processing_common")
ProcessorTesterMixin = import_suite("test_processing_common").ProcessorTesterMixin


class ConvLlavaImageProcessingTester:
    """Settings and images for the suite: seven of 30 to 400 pixels a side, brought to squares of 128."""

    batch_size = 7
    num_channels = 3
    min_resolution = 30
    max_resolution = 400
    settings = {"size": {"height": 128, "width": 128}, "image_aspect_ratio": "pad"}

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent

    def prepare_image_processor_dict(self) -> dict:
        return {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.2, 0.5], "do_convert_rgb": True, **self.settings}

    def prepare_image_inputs(self, batch_size=None, **kwargs) -> list:
        sizes = {"min_resolution": self.min_resolution, "max_resolution": self.max_resolution}
        settings = {"num_channels": self.num_channels, **sizes, **kwargs}
        return image_suite.prepare_image_inputs(self.batch_size if batch_size is None else batch_size, **settings)

    def expected_output_image_shape(self, images: list) -> tuple[int, int, int]:
        return self.num_channels, 128, 128


class NativeImageProcessingTester(ConvLlavaImageProcessingTester):
    """As above, with the aspect ratio kept: up to eight cells of 64 pixels a side, padded to the largest of a batch."""

    settings = {"size": {"height": 128, "width": 256}, "image_aspect_ratio": "native"}

    def expected_output_image_shape(self, images: list) -> tuple[int, int, int]:
        processor = ConvLlavaImageProcessor(**self.settings)
        sizes = []
        for image in images:
            if isinstance(image, Image.Image):
                width, height = image.size
            else:  # numpy: channels last; torch: channels first
                height, width = image.shape[:2] if image.shape[-1] == self.num_channels else image.shape[-2:]
            sizes.append(processor.get_processed_size(height, width))
        return self.num_channels, max(height for height, _ in sizes), max(width for _, width in sizes)


class ConvLlavaImageProcessingTest(image_suite.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = ConvLlavaImageProcessingTester
    image_processing_classes = {"torchvision": ConvLlavaImageProcessor, "pil": ConvLlavaImageProcessorPil}

    def setUp(self):
        self.image_processor_tester = self.image_processor_tester_class(self)

    @property
    def image_processor_dict(self):
        return self.image_processor_tester.prepare_image_processor_dict()

    def test_pil_can_load_without_torchvision(self):
        self.skipTest("the suite looks for the processor's file in transformers itself")


class NativeImageProcessingTest(ConvLlavaImageProcessingTest):
    image_processor_tester_class = NativeImageProcessingTester

    def _assert_tensors_equivalence(self, tensor1, tensor2, **tolerances):
        # torch resizes along the rows first; Pillow 13 along the side that shrinks more. Both clip between the passes,
        # which shows on white noise where one side shrinks and the other grows: 1 value in 1000 by 5 to 30 levels.
        difference = (tensor1 - tensor2).abs()
        assert (difference > 0.05).float().mean() < 0.005  # 0.05: about 3 levels
        super()._assert_tensors_equivalence(tensor1, tensor2, **{**tolerances, "atol": 0.4})


class ConvLlavaProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    """A byte-level tokenizer with the chatml template; images in their own aspect ratio."""

    processor_class = ConvLlavaProcessor

    @classmethod
    def _setup_image_processor(cls):
        return ConvLlavaImageProcessor(image_aspect_ratio="native", size={"height": 256, "width": 256})

    @classmethod
    def _setup_tokenizer(cls):
        return build_tokenizer()

    @staticmethod
    def prepare_processor_dict():
        template = files("convllava_hf").joinpath("chat_templates/chatml.jinja").read_text(encoding="utf-8")
        return {"chat_template": template}


class LlamaTokenizerProcessorTest(ConvLlavaProcessorTest):
    """The tokenizer, template and spacing of a converted checkpoint; images padded to squares."""

    @classmethod
    def _setup_image_processor(cls):
        return ConvLlavaImageProcessor(size={"height": 192, "width": 192})

    @classmethod
    def _setup_tokenizer(cls):
        folder = Path(__file__).parents[1] / "reference" / "convllava" / "llm"
        tokenizer = LlamaTokenizer.from_pretrained(folder, legacy=False, pad_token="<unk>")
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        return tokenizer

    @staticmethod
    def prepare_processor_dict():
        template = files("convllava_hf").joinpath("chat_templates/vicuna_v1.jinja").read_text(encoding="utf-8")
        return {"chat_template": template, "chunk_prefix_space": True}
