"""Paired Gaussian templates: a task on which the true contribution of each modality is known in closed form.

Each of C classes has a template mu_m in every modality m; a sample of class y is x_m = mu_m[y] + sigma_m * noise. The classes are
equally likely, so that p(y | x_S) is a softmax over classes of -sum_{m in S} |x_m - mu_m|^2 / (2 sigma_m^2), for every coalition S.
A hint in the question, which is right with a known probability, makes text a source too.

Knobs of the task are those of balanced multimodal learning: the noise of each modality, corrupted samples, missing media, and
how much the question says.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch

from moka.errors import MokaError


@dataclass
class GaussianSamples:
    """Samples of a `GaussianTask`."""

    labels: torch.Tensor  # [n] the class
    features: dict[str, torch.Tensor]  # modality -> [n, width]
    hint: torch.Tensor  # [n] the class that the question names, or -1
    corrupted: dict[str, torch.Tensor]  # modality -> [n] bool: its features are those of another class

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class GaussianTask:
    """Classes with a template in each modality.

    Args:
        sigma: modality -> standard deviation of its noise; that of the templates is 1.
        classes: number of answers.
        width: features of each modality.
        leak: share of the samples whose question names a class, the right one in all of them.
        corrupt: modality -> share of the samples whose features come from another class.
        seed: of the templates.
    """

    sigma: Mapping[str, float] = field(default_factory=lambda: {"visual": 2.0, "audio": 2.0})
    classes: int = 10
    width: int = 16
    leak: float = 0.0
    corrupt: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    templates: dict[str, torch.Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, share in {"leak": self.leak, **self.corrupt}.items():
            if not 0 <= share <= 1:
                raise MokaError(f"{name}: a share of the samples, from 0 to 1, got {share}.")
        unknown = set(self.corrupt) - set(self.sigma)
        if unknown:
            raise MokaError(f"corrupt: unknown modality {sorted(unknown)}; the task has {list(self.sigma)}.")
        generator = torch.Generator().manual_seed(self.seed)
        self.templates = {
            name: torch.randn(self.classes, self.width, generator=generator) for name in self.sigma
        }  # [classes, width] each

    def sample(self, number: int, seed: int) -> GaussianSamples:
        """Draw ``number`` samples."""
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(self.classes, (number,), generator=generator)
        features, corrupted = {}, {}
        for name, sigma in self.sigma.items():
            wrong = torch.rand(number, generator=generator) < self.corrupt.get(name, 0.0)
            others = (labels + torch.randint(1, self.classes, (number,), generator=generator)) % self.classes
            shown = torch.where(wrong, others, labels)
            noise = torch.randn(number, self.width, generator=generator)
            features[name] = self.templates[name][shown] + sigma * noise
            corrupted[name] = wrong
        hinted = torch.rand(number, generator=generator) < self.leak
        return GaussianSamples(labels, features, torch.where(hinted, labels, -1), corrupted)

    def log_posterior(self, samples: GaussianSamples, coalition: Collection[str]) -> torch.Tensor:
        """Return log p(class | features of the coalition, question) [n, classes], corruption unknown to the observer.

        The question is always visible: a class that it names has probability 1.
        """
        log_p = torch.zeros(len(samples), self.classes)
        for name in coalition:
            distance = torch.cdist(samples.features[name], self.templates[name]) ** 2
            log_p = log_p - distance / (2 * self.sigma[name] ** 2)
        named = samples.hint >= 0
        log_p[named] = -torch.inf
        log_p[named, samples.hint[named]] = 0.0
        return log_p.log_softmax(-1)

    def log_likelihood(self, samples: GaussianSamples, coalition: Collection[str]) -> torch.Tensor:
        """Return log p(label | coalition) [n]: the true value of what `moka.analysis.Contribution` estimates."""
        return self.log_posterior(samples, coalition).gather(1, samples.labels[:, None])[:, 0]
