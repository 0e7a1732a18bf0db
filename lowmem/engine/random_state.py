"""Random number generators of a process as JSON text, and back."""

import base64

import torch


def random_state(device: torch.device) -> dict[str, str]:
    """States of the generators that a step on `device` may use."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def restore_random_state(state: dict[str, str], device: torch.device) -> None:
    """Put back what `random_state` returned; a generator that this machine does not have is left out."""

    def tensor(name: str) -> torch.Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(state[name])), dtype=torch.uint8)

    torch.set_rng_state(tensor("cpu"))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(tensor("cuda"), device)
