"""The demo's own CLIP: an `open_clip` model small enough to train on two cores, under the name `emu-demo`.

Its tokenizer is CLIP's own byte-pair encoding cut to the first merges, so any text still has tokens and the table stays small. Real
pools use `ViT-L-14` by name; this file is needed only where no hub can be reached.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer, default_bpe
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

NAME = "emu-demo"
CONTEXT_TOKENS = 24
BPE_MERGES = 6000
VOCABULARY = 512 + BPE_MERGES + 2  # 256 bytes, the same 256 at a word's end, the merges, start and end of text
TEXT_WIDTH, TEXT_HEADS, TEXT_LAYERS = 96, 4, 2


MODEL_CONFIG = {
    "embed_dim": 96,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64},
    "text_cfg": {
        "context_length": CONTEXT_TOKENS,
        "vocab_size": VOCABULARY,
        "width": TEXT_WIDTH,
        "heads": TEXT_HEADS,
        "layers": TEXT_LAYERS,
    },
}


def write_config(folder: Path) -> None:
    """Writes what `register` and `tokenizer` read: the model config and the cut vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{NAME}.json").write_text(json.dumps(MODEL_CONFIG, indent=2) + "\n", encoding="utf-8")
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as full:
        lines = full.read().split("\n")[: BPE_MERGES + 1]  # the first line is a header
    (folder / "bpe.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))


def register(folder: Path) -> None:
    """Makes `emu-demo` known to `open_clip`, from the config in `folder`."""
    if NAME not in open_clip.list_models():
        open_clip.add_model_config(folder / f"{NAME}.json")


def load(folder: Path) -> tuple[torch.nn.Module, object]:
    """(open_clip model in eval mode, image transform) from `folder`/open_clip_model.safetensors."""
    register(folder)
    model, _, transform = open_clip.create_model_and_transforms(
        NAME, pretrained=str(folder / "open_clip_model.safetensors")
    )
    return model.eval(), transform


def tokenizer(folder: Path) -> SimpleTokenizer:
    """The `open_clip` tokenizer of the registered model."""
    register(folder)
    return open_clip.get_tokenizer(NAME, bpe_path=str(folder / "bpe.txt.gz"))


def hf_text_tower(clip: torch.nn.Module, folder: Path) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """The text tower of an `open_clip` CLIP as `transformers` classes, equal in every token feature up to the end of text."""
    state = clip.state_dict()
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=state["text_projection"].shape[1],
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=TEXT_HEADS,
        max_position_embeddings=CONTEXT_TOKENS,
        hidden_act="gelu",
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=0,
    )
    tower = CLIPTextModel(config)
    renamed = _rename(state)
    wanted = tower.state_dict()
    prefix = "text_model." if any(k.startswith("text_model.") for k in wanted) else ""
    missing, extra = tower.load_state_dict({prefix + k: v for k, v in renamed.items()}, strict=False)
    left = [k for k in missing if "position_ids" not in k]
    assert not left and not extra, f"text tower keys differ: missing {left}, extra {extra}"
    return tower.eval(), _hf_tokenizer(folder)


def _rename(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = {
        "embeddings.token_embedding.weight": state["token_embedding.weight"],
        "embeddings.position_embedding.weight": state["positional_embedding"],
        "final_layer_norm.weight": state["ln_final.weight"],
        "final_layer_norm.bias": state["ln_final.bias"],
    }
    names = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "attn.out_proj": "self_attn.out_proj",
    }
    for layer in range(TEXT_LAYERS):
        ours, theirs = f"transformer.resblocks.{layer}.", f"encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            for old, new in names.items():
                out[f"{theirs}{new}.{kind}"] = state[f"{ours}{old}.{kind}"]
            packed = state[f"{ours}attn.in_proj_{kind}"].chunk(3)
            for name, part in zip(("q_proj", "k_proj", "v_proj"), packed, strict=True):
                out[f"{theirs}self_attn.{name}.{kind}"] = part
    return out


def _hf_tokenizer(folder: Path) -> CLIPTokenizer:
    ours = tokenizer(folder)
    return CLIPTokenizer(
        vocab={_hf_special(token): i for token, i in ours.encoder.items()},
        merges=list(ours.bpe_ranks),
        pad_token="<|endoftext|>",  # as OpenAI's; "!", which has id 0, would turn every exclamation mark of a prompt into padding
        model_max_length=CONTEXT_TOKENS,
    )


def _hf_special(token: str) -> str:
    return {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}.get(token, token)
