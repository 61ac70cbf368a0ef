"""Stands in for the hub's models and data sets: `TINY=1 python examples/NAME.py` runs an example in seconds.

The models are random and have two layers; the data has the columns of the real data set. Nothing is downloaded, and no
GPU is needed; one that is there is used.
"""

import tempfile
from typing import Any

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

IMAGE_TOKENS = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 4096,
}  # fmt: skip
HAS_GPU = torch.cuda.is_available()
TRAINING = {
    "use_cpu": not HAS_GPU,
    "bf16": HAS_GPU,
    "max_steps": 2,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
}
"""Changes of a trainer's arguments."""


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Returns a tokenizer of bytes, with the chat template of Qwen's models."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *IMAGE_TOKENS]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate([*special, *letters])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )


def model() -> str:
    """Returns the folder of a random language model."""
    words, folder = tokenizer(), tempfile.mkdtemp(prefix="tiny-")
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=len(words), pad_token_id=words.pad_token_id, eos_token_id=words.eos_token_id, **SIZES
    )
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def vision_model() -> str:
    """Returns the folder of a random vision-language model."""
    words, folder = tokenizer(), tempfile.mkdtemp(prefix="tiny-")
    start, image, end, video = words.convert_tokens_to_ids(IMAGE_TOKENS)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 8, 8], "mrope_interleaved": True}
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 2, "patch_size": 4, "out_hidden_size": 128,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = transformers.Qwen3VLConfig(
        text_config={"vocab_size": len(words), "rope_parameters": rope, "pad_token_id": words.pad_token_id, **SIZES},
        vision_config=vision, image_token_id=image, video_token_id=video, vision_start_token_id=start,
        vision_end_token_id=end,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    images = transformers.Qwen2VLImageProcessor(patch_size=4, size={"shortest_edge": 64, "longest_edge": 1024})
    videos = transformers.Qwen3VLVideoProcessor(patch_size=4)
    transformers.Qwen3VLProcessor(images, words, videos, chat_template=TEMPLATE).save_pretrained(folder)
    return folder


def data(**columns: Any) -> Dataset:
    """Returns a data set of eight equal rows with these values."""
    return Dataset.from_list([columns] * 8)


def picture() -> Any:
    """Returns a small image of Pillow."""
    from PIL import Image  # the other examples do without it

    return Image.new("RGB", (16, 16), "navy")
