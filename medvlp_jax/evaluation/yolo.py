"""YOLOv3 heads (Redmon and Farhadi 2018, https://arxiv.org/abs/1804.02767) on any encoder.

Three maps from coarse to fine, three anchors each; the anchors of COCO at 416 pixels, rescaled to
the image, as MGCA does. Of a cell at (cx, cy) and an anchor (pw, ph), in pixels:

  x = (sigmoid(tx) + cx) stride      w = pw exp(tw)      section 2.1
  y = (sigmoid(ty) + cy) stride      h = ph exp(th)

A true box belongs to the anchor whose shape is most like its own, in the cell that holds its
centre. Predictions that overlap a true box by more than 0.5 without being its own say neither yes
nor no (section 2.1: ignored).

Axis letters: B images, h, w cells, A anchors a map, C classes, M true boxes, P predictions of all
maps together, Q those that are kept.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from medvlp_jax.evaluation import decoders
from medvlp_jax.layers import Linear

# Section 2.3, width and height in pixels of an image of 416; from coarse to fine.
ANCHORS = (
    ((116, 90), (156, 198), (373, 326)),
    ((30, 61), (62, 45), (59, 119)),
    ((10, 13), (16, 30), (33, 23)),
)
NATIVE = 416
IGNORED_ABOVE = 0.5
KEPT = 100  # predictions of an image over all classes; COCO's maxDets are of a class each
LARGEST = 4.0  # of tw and th: exp(4) is 55 times an anchor
PRIOR = -4.6  # bias of objectness, log(.01 / .99): most cells are empty (RetinaNet, section 4.1)


class Detector(nn.Module):
    """Neck and three heads; see `adaptation`.

    Attributes:
      classes: C.
      width: channels of the finest neck; the coarser ones have twice and four times as many.
    """

    classes: int
    width: int = 128
    targets = ("boxes", "kinds")
    weights = {"place": 2.5, "shape": 2.5, "object": 1.0, "kind": 1.0}  # noqa: RUF012

    @nn.compact
    def __call__(self, encoded, size, *, train=False):
        """Return {"raw": of each map [B, h, w, A, 5 + C], "size": (H, W) as an array}."""
        raw, carried = [], None
        maps = decoders.Pyramid(len(ANCHORS), 2 * self.width, name="pyramid")(
            encoded, size, train=train
        )
        for i, level in enumerate(maps):
            width = self.width << (len(maps) - 1 - i)
            x = level
            if carried is not None:  # what is coarser, narrowed and enlarged (section 2.3)
                small = decoders.Convolution(width // 2, 1, name=f"narrow_{i}")(
                    carried, train=train
                )
                x = jnp.concatenate(
                    [decoders.resized(small, level.shape[1:3], "nearest"), level], axis=-1
                )
            x = decoders.Convolution(width // 2, 1, name=f"in_{i}")(x, train=train)
            carried = decoders.Convolution(width, name=f"neck_{i}")(x, train=train)
            raw.append(self._head(carried, i, train))
        return {"raw": raw, "size": jnp.asarray(size, jnp.float32)}

    def _head(self, x, i, train):
        count = len(ANCHORS[i])

        def bias(key, shape, dtype=jnp.float32):
            del key
            values = np.zeros((count, 5 + self.classes), np.float32)
            values[:, 4] = PRIOR
            return jnp.asarray(values.reshape(shape), dtype)

        init = nn.initializers.truncated_normal(0.02)
        y = Linear(count * (5 + self.classes), kernel_init=init, bias_init=bias, name=f"head_{i}")(
            x, train=train
        )
        return y.reshape(*y.shape[:3], count, 5 + self.classes)

    def losses(self, outputs, batch):
        """Return {"place", "shape", "object", "kind"}, see `losses`."""
        return losses(outputs, batch["boxes"], batch["kinds"])

    def predict(self, outputs, batch):
        """Return the best KEPT predictions, and the true boxes beside them."""
        found = candidates(outputs, KEPT * 3)
        return found | {"true_boxes": batch["boxes"], "true_kinds": batch["kinds"]}


def anchors_of(size) -> list[jax.Array]:
    """Return the anchors of each map, (height, width) in pixels of images of size (H, W)."""
    return [jnp.array(group, jnp.float32)[:, ::-1] * (size / NATIVE) for group in ANCHORS]


def decoded(outputs):
    """Return boxes [B, P, 4], objectness logits [B, P] and class logits [B, P, C] of all maps."""
    boxes, objects, kinds = [], [], []
    for raw, anchors in zip(outputs["raw"], anchors_of(outputs["size"]), strict=True):
        batch, height, width, _, fields = raw.shape
        raw = raw.astype(jnp.float32)
        stride = outputs["size"] / jnp.array([height, width], jnp.float32)
        x = (jax.nn.sigmoid(raw[..., 0]) + jnp.arange(width)[:, None]) * stride[1]
        y = (jax.nn.sigmoid(raw[..., 1]) + jnp.arange(height)[:, None, None]) * stride[0]
        across = anchors[:, 1] * jnp.exp(jnp.minimum(raw[..., 2], LARGEST)) / 2
        down = anchors[:, 0] * jnp.exp(jnp.minimum(raw[..., 3], LARGEST)) / 2
        corners = jnp.stack([y - down, x - across, y + down, x + across], axis=-1)
        boxes.append(corners.reshape(batch, -1, 4))
        objects.append(raw[..., 4].reshape(batch, -1))
        kinds.append(raw[..., 5:].reshape(batch, -1, fields - 5))
    return tuple(jnp.concatenate(parts, axis=1) for parts in (boxes, objects, kinds))


def candidates(outputs, kept: int) -> dict:
    """Return the predictions of highest score, objectness times class probability.

    Args:
      outputs: of a Detector.
      kept: Q, or fewer where there are not so many.

    Returns:
      "boxes" [B, Q, 4] cut off at the sides, "scores" [B, Q] falling, "kinds" [B, Q].
    """
    boxes, objects, kinds = decoded(outputs)
    classes = kinds.shape[-1]
    scores = jax.nn.sigmoid(objects)[..., None] * jax.nn.sigmoid(kinds)  # [B, P, C]
    flat = scores.reshape(len(scores), -1)
    best, where = jax.lax.top_k(flat, min(kept, flat.shape[1]))
    chosen = jnp.take_along_axis(boxes, (where // classes)[..., None], axis=1)
    sides = jnp.tile(outputs["size"], 2)
    return {"boxes": jnp.clip(chosen, 0, sides), "scores": best, "kinds": where % classes}


def losses(outputs, boxes, kinds) -> dict:
    """Return the four terms, each a mean over true boxes, objectness over images.

    place: cross-entropy of sigmoid(tx), sigmoid(ty) against where in its cell the centre lies
    shape: squared error of tw and th
    kind: cross-entropy of the classes
    object: cross-entropy of every prediction, ignored ones left out, summed over an image and
      divided by the mean number of true boxes an image, at least 1

    place and shape weigh 2 - area of the box / area of the image, so that small boxes count.

    Args:
      outputs: of a Detector.
      boxes: [B, M, 4] pixels.
      kinds: [B, M] int, -1 where there is no box.
    """
    size, anchors = outputs["size"], anchors_of(outputs["size"])
    real = kinds >= 0
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2  # (y, x)
    extent = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 1e-3)  # (h, w)
    own = shape_iou(extent[..., None, :], jnp.concatenate(anchors)).argmax(-1)  # [B, M]
    emphasis = 2 - extent.prod(-1) / size.prod()
    count = jnp.maximum(real.sum(), 1)
    image = jnp.arange(len(boxes))[:, None]
    terms = {"place": 0.0, "shape": 0.0, "kind": 0.0}
    wanted, first = [], 0
    for raw, group in zip(outputs["raw"], anchors, strict=True):
        raw = raw.astype(jnp.float32)
        cells = jnp.array(raw.shape[1:3], jnp.float32)
        place = centre / (size / cells)
        cell = jnp.clip(jnp.floor(place), 0, cells - 1)
        here = real & (own >= first) & (own < first + len(group))
        anchor = jnp.where(here, own - first, 0)
        at = (image, cell[..., 0].astype(int), cell[..., 1].astype(int), anchor)
        said = raw[at]  # [B, M, 5 + C]
        inside = jnp.clip(place - cell, 0, 1)[..., ::-1]  # (x, y)
        ratio = jnp.log(extent / jnp.take(group, anchor, axis=0))[..., ::-1]  # (w, h)
        cross = optax.sigmoid_binary_cross_entropy
        one_hot = jax.nn.one_hot(kinds, raw.shape[-1] - 5)
        each = {
            "place": emphasis * cross(said[..., :2], inside).sum(-1),
            "shape": emphasis * jnp.square(said[..., 2:4] - ratio).sum(-1),
            "kind": cross(said[..., 5:], one_hot).sum(-1),
        }
        for name, value in each.items():
            terms[name] += (value * here).sum() / count
        wanted.append(jnp.zeros(raw.shape[:4]).at[at].max(here.astype(jnp.float32)))
        first += len(group)
    wanted = jnp.concatenate([w.reshape(len(boxes), -1) for w in wanted], axis=1)  # [B, P]
    found, objects, _ = decoded(outputs)
    found = jax.lax.stop_gradient(found)
    overlap = jnp.where(real[:, None], box_iou(found[:, :, None], boxes[:, None]), 0).max(-1)
    counted = (wanted > 0) | (overlap <= IGNORED_ABOVE)
    each = optax.sigmoid_binary_cross_entropy(objects, wanted) * counted
    return terms | {"object": each.sum() / jnp.maximum(real.sum(), len(boxes))}


def shape_iou(a, b):
    """Return IoU of extents (h, w) [..., 2] laid on one corner."""
    both = jnp.minimum(a, b).prod(-1)
    return both / (a.prod(-1) + b.prod(-1) - both)


def box_iou(a, b):
    """Return IoU of boxes [..., 4], broadcast; 0 for empty ones. NumPy or JAX arrays."""
    np_ = np if isinstance(a, np.ndarray) else jnp
    top, bottom = np_.maximum(a[..., :2], b[..., :2]), np_.minimum(a[..., 2:], b[..., 2:])
    both = np_.maximum(bottom - top, 0).prod(-1)
    area = lambda x: np_.maximum(x[..., 2:] - x[..., :2], 0).prod(-1)
    union = area(a) + area(b) - both
    return np_.where(union > 0, both / np_.where(union > 0, union, 1), 0)
