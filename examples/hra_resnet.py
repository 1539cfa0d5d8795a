"""Train HRA on the convolutions of a ResNet-50, with a new output layer, on a folder of images.

The folder holds one subfolder of images for each class.

python examples/hra_resnet.py --images my_images --save hra_resnet
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halotune import HRAConfig, PeftModel, get_peft_model


def main(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    save: str | None = None,
    epochs: int = 3,
    lr: float = 1e-3,
) -> tuple[PeftModel, list[float]]:
    """The adapted model, and the loss before each step.

    Args:
        model: a ResNet with bottleneck blocks and torchvision's names of modules.
        batches: images `(batch, 3, height, width)` with the indices of their classes.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = HRAConfig(
        r=8,
        target_modules=["conv1", "conv2"],  # the stem, and two of the three convolutions of each block
        modules_to_save=["fc"],  # the output layer is new, so it is fully fine-tuned
        apply_GS=True,
        init_weights=True,
    )
    adapted = get_peft_model(model.to(device), config)
    adapted.print_trainable_parameters()

    adapted.eval()  # batch normalisation keeps its statistics, which are the base's and not in the adapter's file
    optimizer = torch.optim.Adam((p for p in adapted.parameters() if p.requires_grad), lr=lr)
    losses = []
    for epoch in range(epochs):
        for images, labels in batches:
            loss = F.cross_entropy(adapted(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: loss {losses[-1]:.3f}")

    if save:
        adapted.save_pretrained(save)
    return adapted, losses


if __name__ == "__main__":
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.models import ResNet50_Weights, resnet50

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--images", required=True, help="a folder with one subfolder of images for each class")
    parser.add_argument("--save", help="the folder that the adapter goes to")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--lr", type=float)
    arguments = vars(parser.parse_args())

    weights = ResNet50_Weights.DEFAULT
    data = ImageFolder(arguments.pop("images"), transform=weights.transforms())
    resnet = resnet50(weights=weights)
    resnet.fc = nn.Linear(resnet.fc.in_features, len(data.classes))
    main(resnet, DataLoader(data, batch_size=16, shuffle=True), **arguments)
