"""CLIP in miniature on generated radiographs: seconds to compile, for tests of whole processes."""

from ml_collections import ConfigDict

from configs import common

BLOCK = {"depth": 1, "width": 32, "num_heads": 2, "mlp_dim": 64}


def get_config() -> ConfigDict:
    """Return the resolved config."""
    return ConfigDict(
        {
            "recipe": {
                "name": "clip",
                "image": {"name": "vit", "variant": "tiny", **BLOCK, "dtype": "float32"},
                "text": {
                    "name": "bert",
                    "variant": "tiny",
                    **BLOCK,
                    "pooling": "mean",
                    "dropout": 0.1,
                    "attention_dropout": 0.0,
                    "dtype": "float32",
                },
                "weights": {"contrastive": 1.0},
                "dim": 16,
                "loss": "info_nce",
                "section": "report",
                "same_text": False,
                "train_text": True,
                "loss_tile": 4,
            },
            "data": common.data(
                corpora=("cxr_phantom:tiny",),
                tokenizer="cxr_phantom",
                text_length=24,
                size=36,
                crop=32,
                decode_cache=512,
            ),
            "optim": common.optim(lr=1e-3, warmup=5),
            "train": common.train(
                steps=50,
                batch_size=16,
                log_every=1,
                checkpoint_every=10,
                evaluate_every=20,
                evaluate_limit=32,
            ),
            "evals": common.evals(
                protocols=("zero_shot",), limit=32, resamples=5, controls=(), batch_size=16
            ),
            **common.rest(init={"text": "mlm"}, mlm={"steps": 5, "batch_size": 16, "warmup": 1}),
        }
    )
