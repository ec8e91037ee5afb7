"""A LLaVA of 0.2 million weights that has learnt to rate a few images, saved as a published model is.

It knows bytes, one prompt and three shades of grey, and is trained until it says the right words: 20 seconds on one
core. `transformers serve FOLDER` then is a real server with a real vision-language model behind it.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

IMAGE_TOKEN = "<|image|>"  # not `<image>`, which stands in UnifiedReward's instruction as plain text
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: "
    "{% for part in message.content %}{{ '<|image|>' if part.type == 'image' else part.text }}{% endfor %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
SIDE, PATCH = 56, 14
MAX_STEPS = 600

Lesson = tuple[Image.Image, str, str]
"""Image, what is asked, what is to be answered."""


def save_tiny_vlm(folder: Path, lessons: Sequence[Lesson]) -> None:
    """Train on the lessons until every answer is known by heart; AssertionError where that does not come about."""
    torch.manual_seed(0)
    processor = _processor()
    model = _model(processor.tokenizer)
    batch = _batch(processor, lessons)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    answers = batch["labels"][:, 1:] != -100
    for _ in range(MAX_STEPS):
        output = model(**batch)
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        # Sure of every byte, not only right: rounding differs with padding and batch.
        said = output.logits[:, :-1].softmax(-1).gather(-1, batch["labels"][:, 1:].clamp(min=0)[..., None])[..., 0]
        if said[answers].min() > 0.95:
            break
    else:
        raise AssertionError(f"not learnt in {MAX_STEPS} steps: the least sure byte has {said[answers].min():.2f}")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _processor() -> LlavaProcessor:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token="<|end|>",
            pad_token="<|pad|>",
            extra_special_tokens=[IMAGE_TOKEN],
            model_max_length=4096,
        ),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


def _model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def _batch(processor: LlavaProcessor, lessons: Sequence[Lesson]) -> dict[str, torch.Tensor]:
    """The lessons as one right-padded batch, with a label for every byte of an answer and for its end."""
    asked = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
        )
        for _, question, _ in lessons
    ]
    whole = [f"{question}{answer}<|end|>" for question, (_, _, answer) in zip(asked, lessons, strict=True)]
    images = [image for image, _, _ in lessons]
    batch = processor(images=images, text=whole, padding=True, padding_side="right", return_tensors="pt")
    labels = batch["input_ids"].clone()
    for row, (question, image) in enumerate(zip(asked, images, strict=True)):
        labels[row, : processor(images=image, text=question, return_tensors="pt")["input_ids"].shape[1]] = -100
    labels[batch["attention_mask"] == 0] = -100
    return {**batch, "labels": labels}
