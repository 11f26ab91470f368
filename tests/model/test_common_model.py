"""transformers' common test suites on our configuration and models; `transformers_suite` says where they come from."""

import copy
import unittest
from contextlib import nullcontext
from unittest.mock import patch

import torch
from transformers.testing_utils import torch_device
from transformers_suite import import_suite

from convllava_hf import ConvLlavaConfig, ConvLlavaForConditionalGeneration, ConvLlavaModel


ConfigTester = import_suite("test_configuration_common").ConfigTester
modeling_suite = import_suite("test_modeling_common")
TrainingTesterMixin = import_suite("test_training_mixin").TrainingTesterMixin
GenerationTesterMixin = import_suite("generation.test_utils").GenerationTesterMixin
ExportGenerateTesterMixin = import_suite("exporters.test_export").ExportGenerateTesterMixin


class ConvLlavaModelTester:
    """A tiny model and inputs in the form that the suites ask for: two rows with an image of `64 x 128` each."""

    batch_size = 2
    num_channels = 3
    image_size = (64, 128)
    num_image_tokens = 2
    seq_length = 9
    image_token_id = 2  # the suites shrink the vocabulary and clamp the ids to it
    text_config = {
        "model_type": "llama",
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    vision_config = {
        "model_type": "convnext",
        "num_stages": 5,
        "depths": [1, 1, 1, 1, 1],
        "hidden_sizes": [8, 8, 16, 16, 24],
        "image_size": 128,
        "hidden_size": 24,  # the tower does not have it; the suite looks here for the width of the image features
    }

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent
        self.is_training = True
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            setattr(self, name, self.text_config[name])

    def get_config(self) -> ConvLlavaConfig:
        return ConvLlavaConfig(
            vision_config=copy.deepcopy(self.vision_config),
            text_config=copy.deepcopy(self.text_config),
            image_token_id=self.image_token_id,
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        pixel_values = torch.randn(self.batch_size, self.num_channels, *self.image_size, device=torch_device)
        # Ids of words only: no end of text, no padding, no placeholder.
        input_ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length), device=torch_device)
        input_ids[:, 1 : 1 + self.num_image_tokens] = self.image_token_id
        return config, {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": pixel_values,
            "image_sizes": torch.tensor([self.image_size] * self.batch_size, device=torch_device),
        }


class ConvLlavaModelTest(
    GenerationTesterMixin, ExportGenerateTesterMixin, modeling_suite.ModelTesterMixin, unittest.TestCase
):
    all_model_classes = (ConvLlavaModel, ConvLlavaForConditionalGeneration)
    all_generative_model_classes = (ConvLlavaForConditionalGeneration,)
    test_torch_exportable = True
    _is_composite = True

    def setUp(self):
        self.model_tester = ConvLlavaModelTester(self)
        # The suite trains every class that this table does not list as headless.
        names = patch.dict(modeling_suite.MODEL_MAPPING_NAMES, convllava=ConvLlavaModel.__name__)
        names.start()
        self.addCleanup(names.stop)

    def _image_features_get_expected_num_hidden_states(self, model_tester=None):
        return 1 + self.model_tester.vision_config["num_stages"]  # what the first stage gets, and what each gives

    def test_get_image_features_attentions(self):
        self.skipTest("a convolutional tower has no attentions")

    def test_sdpa_can_dispatch_non_composite_models(self):
        self.skipTest("the model is composite; test_sdpa_can_dispatch_composite_models runs in its place")

    def test_bc_torch_dtype(self):
        # Of its ten seconds, the suite spends nine on thousands of subtest reports and on printing equal tensors.
        torch.set_printoptions(threshold=1, edgeitems=1)
        self.addCleanup(torch.set_printoptions, profile="default")
        with patch.object(self, "subTest", nullcontext):
            super().test_bc_torch_dtype()


class ConvLlavaTrainingTest(TrainingTesterMixin, unittest.TestCase):
    """Overfits one batch of text and generates it."""

    all_model_classes = (ConvLlavaForConditionalGeneration,)
    model_tester = None

    def setUp(self):
        self.model_tester = ConvLlavaModelTester(self)
        self.model_tester.image_token_id = 98  # not among the words of the suite's text: it is never generated
        config = self.model_tester.get_config()
        config.vocab_size = config.text_config.vocab_size  # the suite looks for it here
        self.model_tester.get_config = lambda: config


class ConvLlavaConfigTest(unittest.TestCase):
    def test_config(self):
        self.model_tester = ConvLlavaModelTester(self)
        ConfigTester(self, config_class=ConvLlavaConfig, has_text_modality=False).run_common_tests()
