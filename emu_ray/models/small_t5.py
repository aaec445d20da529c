"""The demo's own second text encoder: a T5 of 0.2 M parameters, pretrained by T5's own task on captions (arXiv 1910.10683, section 3.1.4).

Real runs use T5-XXL by name; this file is needed only where no hub can be reached.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

SENTINELS = 8
TOKENS = 24


def train_tokenizer(captions: list[str]) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer of at most 512 pieces that falls back to single letters; padding 0, end of sentence 1."""
    sentinels = [f"<extra_id_{i}>" for i in range(SENTINELS)]
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    letters = [chr(c) for c in range(32, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "</s>", "<unk>", *sentinels],
        initial_alphabet=letters,
        show_progress=False,
    )
    core.train_from_iterator(sorted(set(captions)), trainer)
    core.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TOKENS
    )


def build(vocabulary: int) -> T5ForConditionalGeneration:
    """A fresh encoder and decoder; the decoder is dropped after pretraining."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocabulary, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_decoder_layers=1, num_heads=4,
            dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        )
    )  # fmt: skip


def corrupt_spans(ids: torch.Tensor, first_sentinel: int, draws: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs, labels), each (B, T), for ids (B, T): every masked run becomes one sentinel; the labels name what it hid.

    `draws` (B, T) uniform in 0..1 decide: about 30 % of the tokens are masked. Labels are padded with -100.
    """
    inputs = torch.zeros_like(ids)
    labels = torch.full((ids.shape[0], ids.shape[1] + SENTINELS), -100)
    for row, (tokens, draw) in enumerate(zip(ids.tolist(), draws.tolist(), strict=True)):
        length = tokens.index(1) if 1 in tokens else len(tokens)
        source: list[int] = []
        target: list[int] = []
        spans, inside = 0, False
        for token, u in zip(tokens[:length], draw, strict=False):
            masked = u < 0.3 and (inside or spans < SENTINELS)
            if masked and not inside:
                source.append(first_sentinel + spans)
                target.append(first_sentinel + spans)
                spans += 1
            (target if masked else source).append(token)
            inside = masked
        source, target = [*source, 1][: inputs.shape[1]], [*target, 1][: labels.shape[1]]
        inputs[row, : len(source)] = torch.tensor(source)
        labels[row, : len(target)] = torch.tensor(target)
    return inputs, labels
