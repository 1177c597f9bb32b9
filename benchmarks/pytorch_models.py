"""IMITATE, CLIP and CFCML in PyTorch, from a batch to the loss, for benchmarks/steps.py.

Plain PyTorch as its users write it, encoders from `transformers`, layers from torch.nn, without a
line of ours. Modules bear the names of our parameters, so that `heads` can hand their weights over.
What only costs time is left out for PyTorch's sake: IMITATE's release encodes each view twice and
its frozen reports in every step; here, as with us, once and before training.

Images come as uint8 [B, H, W, C], C = 1 or 3.
Axis letters: B batch, C channels, E joint width, K classes, M modalities, N tokens in, T tokens of
a text or of the reading head.
"""

import itertools
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

NEVER = -1e30  # logit of what takes no part: finite, for the gradient's sake
EPSILON = 1e-8  # CFCML's, in the logarithm


def normalise(images):
    """Map uint8 [B, H, W, C] to float [B, 3, H, W] by ImageNet's statistics, channels last."""
    x = images.permute(0, 3, 1, 2).expand(-1, 3, -1, -1).float() / 255
    mean = x.new_tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
    std = x.new_tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


def info_nce(x, y, temperature, valid, prior=None):
    """Both directions of InfoNCE, their mean over valid anchors.

    Args:
      x: unit norm [B, E].
      y: likewise.
      temperature: divides the cosines.
      valid: [B], examples that take part.
      prior: targets [B, B] besides the diagonal; None for none.
    """
    pairs = valid[:, None] & valid[None, :]
    target = torch.eye(len(x), device=x.device) + (0 if prior is None else prior)
    target = torch.where(pairs, target, 0.0)
    with torch.autocast(x.device.type, enabled=False):
        logits = torch.where(pairs, x.float() @ y.float().T / temperature, NEVER)
    rows = -(target * logits.log_softmax(1)).sum()
    columns = -(target * logits.log_softmax(0)).sum()
    return (rows + columns) / 2 / valid.sum()


class Clip(nn.Module):
    """Two encoders, a projection each, a learned scale."""

    def __init__(self, spec: Mapping, image: nn.Module, text: nn.Module):
        """Take the settings of configs/clip.py and encoders of `transformers`."""
        super().__init__()
        self.image, self.text, self.section = image, text, spec["section"]
        self.image_projection = nn.Linear(image.config.hidden_size, spec["dim"], bias=False)
        self.text_projection = nn.Linear(text.config.hidden_size, spec["dim"], bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, batch):
        """Return the loss."""
        image = self.image(pixel_values=normalise(batch["image"])).last_hidden_state[:, 0]
        ids, mask = (batch[f"{self.section}/{kind}"].long() for kind in ("ids", "mask"))
        text = self.text(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
        image = F.normalize(self.image_projection(image), dim=-1)
        text = F.normalize(self.text_projection(text), dim=-1)
        temperature = 1 / self.log_scale.exp().clamp(max=100)
        return info_nce(image, text, temperature, batch[f"{self.section}_valid"])


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation whose statistics can be those of some examples alone."""

    def forward(self, x, valid=None):
        """Map [B, D] to [B, D]; `valid` [B], which examples count, None for all."""
        if valid is None:
            return super().forward(x)
        weight = valid[:, None].float()
        count = weight.sum()
        mean = (weight * x).sum(0) / count
        var = (weight * (x - mean).square()).sum(0) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        x = (x - mean) * (var + self.eps).rsqrt()
        return x * self.weight + self.bias if self.affine else x


class Head(nn.Module):
    """Linear, BatchNorm, ReLU, Linear, BatchNorm without affine; unit norm."""

    def __init__(self, width, hidden, dim):
        """Name the layers."""
        super().__init__()
        self.first, self.norm = nn.Linear(width, hidden), BatchNorm(hidden)
        self.second, self.last_norm = nn.Linear(hidden, dim), BatchNorm(dim, affine=False)

    def forward(self, x, valid=None):
        """Map [B, D] to [B, dim]; `valid` as in BatchNorm."""
        hidden = self.norm(self.first(x), valid).relu()
        return F.normalize(self.last_norm(self.second(hidden), valid), dim=-1)


class ReadingHead(nn.Module):
    """Drawn channels of all levels as tokens; the class token, last, attends to them."""

    def __init__(self, dim, num_tokens, width=256):
        """Name the layers; positions and class token start away from zero."""
        super().__init__()
        self.positions = nn.Parameter(0.02 * torch.randn(1, num_tokens + 1, width))
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.head = Head(width, width, dim)

    def forward(self, levels, draws):
        """Map levels [B, C, H, W] and channel indices of each to [B, dim]."""
        pooled = [F.adaptive_avg_pool2d(x[:, d], 16) for x, d in zip(levels, draws, strict=True)]
        tokens = torch.cat(pooled, 1).flatten(2)  # [B, T, 256]
        room = self.positions.shape[1] - 1 - tokens.shape[1]
        tokens = F.pad(tokens, (0, 0, 0, room)) + self.positions[:, 1:]
        last = (self.class_token + self.positions[:, :1]).expand(len(tokens), -1, -1)
        tokens = torch.cat([tokens, last], 1)
        # The other rows of the attention are not used: only this query is asked.
        attended = self.attention(last, tokens, tokens, need_weights=False)[0]
        return self.head((attended + last)[:, 0])


class Imitate(nn.Module):
    """IMITATE with cached report features, two backbone passes."""

    def __init__(self, spec: Mapping, image: nn.Module):
        """Take the settings of configs/imitate.py and a ResNet of `transformers`."""
        super().__init__()
        self.spec, self.image = spec, image
        width = image.config.hidden_sizes[-1]
        self.diagnosis = Head(width, width, spec["dim"])
        self.reading = ReadingHead(spec["dim"], spec["num_tokens"])
        self.text_head = Head(768, spec["text_hidden"], spec["dim"])

    def prior(self, report, valid):
        """Return S [B, B] of the "exp" kernel: 1 - exp(-strength max(0, Pearson)), 0 diagonal."""
        if self.spec["centre_prior"]:
            report = report - (valid[:, None] * report).sum(0) / valid.sum()
        rho = torch.corrcoef(report).clamp(min=0).fill_diagonal_(0)
        smoothed = 1 - torch.exp(-self.spec["strength"] * rho)
        return torch.where(valid[:, None] & valid[None, :], smoothed, 0.0)

    def forward(self, batch):
        """Return the loss."""
        spec, views = self.spec, []
        for view, draws in (("image", (0, 2)), ("image_2", (1, 3))):
            out = self.image(pixel_values=normalise(batch[view]), output_hidden_states=True)
            levels = out.hidden_states[1:]
            diagnosis = self.diagnosis(levels[-1].mean((2, 3)))
            reads = [
                self.reading(levels, [batch[f"draw/{i}/{s}"] for s in range(len(levels))])
                for i in draws
            ]
            views.append((diagnosis, *reads))
        (d_1, r_1, again_1), (d_2, r_2, again_2) = views
        findings, impression = (batch[f"{s}_feature"] for s in ("findings", "impression"))
        has_findings, has_impression = (batch[f"{s}_valid"] for s in ("findings", "impression"))
        text_findings = self.text_head(findings, has_findings)
        text = self.text_head(impression, has_impression)
        tau, tau_v = spec["temperature"], spec["view_temperature"]
        s_findings = tau * self.prior(findings, has_findings)
        s_impression = self.prior(impression, has_impression)
        everything = torch.ones_like(has_impression)
        terms = {
            "impression": sum(
                2 * info_nce(d, text, tau, has_impression, tau * s_impression) for d in (d_1, d_2)
            ),
            "findings": sum(
                2 * info_nce(r, text_findings, tau, has_findings, s_findings) for r in (r_1, r_2)
            ),
            "view_diagnosis": 4 * info_nce(d_1, d_2, tau_v, everything, tau_v * s_impression),
            "view_reading": 4 * info_nce(again_1, again_2, tau_v, has_findings),
        }
        return sum(spec["weights"][name] * term for name, term in terms.items())


class TokenConv(nn.Conv1d):
    """A convolution along the features [B, N, C] whose channels are the tokens."""

    def __init__(self, tokens, features):
        """Take N and the number of tokens out."""
        super().__init__(tokens, features, 3, padding=1)


class CrossAttention(nn.MultiheadAttention):
    """What tokens [B, n, C] find in the others [B, U, C]."""

    def forward(self, x, others):
        """Return [B, n, C]."""
        return super().forward(x, others, others, need_weights=False)[0]


class Fusion(nn.Module):
    """Stages of every modality, related at each stage, to features and logits."""

    def __init__(self, spec, widths, sides, table):
        """Name the layers.

        Args:
          spec: the settings of configs/cfcml.py.
          widths: channels of each stage of the image encoder.
          sides: pixels of each, both axes together.
          table: T and D of the table.
        """
        super().__init__()
        dim, self.modalities = spec["dim"], (*spec["images"], "tabular")
        self.attributes = nn.Linear(table[1], dim)
        counts = dict.fromkeys(spec["images"], spec["image_tokens"])
        counts["tabular"] = spec["table_tokens"]
        self.depth = len(widths)
        for name in self.modalities:
            is_table = name == "tabular"
            for s, (width, side) in enumerate(zip(widths, sides, strict=True)):
                if not is_table or s == 0:
                    given = table[0] if is_table else side
                    setattr(self, f"compress_{s}_{name}", TokenConv(given, counts[name]))
                if not is_table and width != dim:
                    setattr(self, f"project_{s}_{name}", nn.Linear(width, dim))
                attend = CrossAttention(dim, spec["num_heads"], batch_first=True)
                setattr(self, f"attend_{s}_{name}", attend)
            joined = TokenConv(2 * counts[name] * self.depth, counts[name])
            setattr(self, f"aggregate_{name}", joined)
        outs = (dim * len(self.modalities), *spec["hidden"], spec["num_classes"])
        for i, (given, wanted) in enumerate(itertools.pairwise(outs)):
            name = "logits" if i == len(spec["hidden"]) else f"hidden_{i}"
            setattr(self, name, nn.Linear(given, wanted))
        self.hidden, self.dropout = len(spec["hidden"]), nn.Dropout(spec["dropout"])

    def compress(self, name, s, x):
        """Return n tokens [B, n, C] of stage s."""
        x = getattr(self, f"compress_{s}_{name}")(x)
        project = getattr(self, f"project_{s}_{name}", None)
        return x if project is None else project(x)

    def forward(self, stages):
        """Map {modality: tokens of each stage [B, N, c]} to z [B, M, C] and logits [B, K]."""
        tokens = {
            "tabular": [self.compress("tabular", 0, self.attributes(stages["tabular"]).relu())]
        }
        tokens["tabular"] *= self.depth
        for name in self.modalities[:-1]:
            tokens[name] = [self.compress(name, s, x) for s, x in enumerate(stages[name])]
        pooled = []
        for name in self.modalities:
            enhanced = []
            for s in range(self.depth):
                own = tokens[name][s]
                others = torch.cat([tokens[o][s] for o in self.modalities if o != name], 1)
                enhanced += [own, getattr(self, f"attend_{s}_{name}")(own, others)]
            pooled.append(getattr(self, f"aggregate_{name}")(torch.cat(enhanced, 1)).mean(1))
        z = torch.stack(pooled, 1)
        x = z.flatten(1)
        for i in range(self.hidden):
            x = self.dropout(getattr(self, f"hidden_{i}")(x).relu())
        return z, self.logits(x)


class Cfcml(nn.Module):
    """One Swin for all images, the fusion, cross-entropy and the three relations."""

    def __init__(self, spec: Mapping, image: nn.Module, table: tuple[int, int]):
        """Take the settings of configs/cfcml.py, a Swin of `transformers` and T, D of the table."""
        super().__init__()
        self.spec, self.image = spec, image
        config = image.config
        depth = len(config.depths)
        side = config.image_size // config.patch_size
        widths = [config.embed_dim * 2**s for s in range(depth)]
        sides = [(side // 2**s) ** 2 for s in range(depth)]
        self.fusion = Fusion(spec, widths, sides, table)

    def forward(self, batch):
        """Return the loss."""
        stages = {"tabular": batch["tabular"]}
        for name in self.spec["images"]:
            out = self.image(
                pixel_values=normalise(batch[name]),
                output_hidden_states=True,
                output_hidden_states_before_downsampling=True,
            )
            levels = [x.flatten(2).transpose(1, 2) for x in out.reshaped_hidden_states[1:-1]]
            stages[name] = [*levels, out.last_hidden_state]
        z, logits = self.fusion(stages)
        label = batch["label"]
        terms = self.relations(z.transpose(0, 1), label)
        terms["cross_entropy"] = F.cross_entropy(logits, label)
        return sum(self.spec["weights"][name] * term for name, term in terms.items())

    def relations(self, z, label):
        """Return CFCML's three losses of z [M, B, C]; every class is in the batch."""
        tau, classes = self.spec["temperature"], self.spec["num_classes"]
        z = F.normalize(z, dim=-1)
        member = F.one_hot(label, classes).float()  # [B, K]
        unimodal = F.normalize(torch.einsum("mbc,bk->mkc", z, member), dim=-1)
        crossmodal = F.normalize(torch.einsum("mbc,bk->kc", z, member), dim=-1)

        def relation(own, others, away):
            near = own.logsumexp(-1)
            others = torch.where(away, others, NEVER)
            return -torch.log(
                torch.exp(near - torch.cat([own, others], -1).logsumexp(-1)) + EPSILON
            )

        own = torch.cat(
            [
                torch.einsum("mbc,bc->mb", z, crossmodal[label])[..., None],
                torch.einsum("mbc,nbc->mbn", z, unimodal[:, label]),
            ],
            -1,
        )
        others = z @ z.transpose(1, 2)
        share = 1 / member.sum(0)[label]
        different = label[:, None] != label[None, :]
        sample = (relation(own / tau, others / tau, different) * share).sum()
        away = ~torch.eye(classes, dtype=torch.bool, device=z.device)
        own = torch.einsum("mkc,kc->mk", unimodal, crossmodal)[..., None]
        others = torch.einsum("mkc,nlc->mknl", unimodal, unimodal).flatten(2)
        terms = relation(own / tau, others / tau, away.tile(1, len(z)))
        uni = EPSILON + terms.sum() / len(z)
        own = torch.einsum("kc,mkc->km", crossmodal, unimodal)
        terms = relation(own / tau, crossmodal @ crossmodal.T / tau, away)
        return {"sample": sample, "unimodal": uni, "crossmodal": EPSILON + terms.mean()}
