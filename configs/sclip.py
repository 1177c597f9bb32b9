"""S-CLIP, few pairs and images apart, a control of LGDEA. Variants: "" (as clip.py), demo."""

from ml_collections import ConfigDict

from configs import clip, common, lgdea

VARIANTS = ("", "demo")


def get_config(variant: str = "") -> ConfigDict:
    """Return the resolved config of a variant."""
    if variant not in VARIANTS:
        known = ", ".join(VARIANTS[1:])
        raise ValueError(f"No variant '{variant}' of configs/sclip.py. Known: {known}.")
    config = clip.get_config(variant)
    config.recipe = recipe(config.recipe.image, config.recipe.text, config.recipe.dim)
    config.data.pairing.ratio = 0.1  # half of a batch are pairs
    config.data.view.update(lgdea.UPRIGHT)  # phrases tell sides
    return config


def recipe(image: ConfigDict, text: ConfigDict, dim: int = 512) -> ConfigDict:
    """Every field is explained in recipes/sclip.py."""
    weights = common.weights(contrastive=1.0, caption=0.5, keyword=0.5)
    return ConfigDict(
        {
            "name": "sclip",
            "image": image,
            "text": text,
            "weights": weights,
            "dim": dim,
            "loss_tile": 512,
        }
    )
