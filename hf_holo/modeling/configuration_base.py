"""What the configs of all families share."""

from transformers import PretrainedConfig

FORMAT = 1  # rises when a config or checkpoint stops being readable by older releases


class RecurrentConfig(PretrainedConfig):
    """Base of the configs of this package: refuses configs written in a newer format.

    Every config has `causal`: None (what the head needs; True where it works with both), True or False.

    Args:
        format_version: format of the saved config; set on saving, checked on loading.

    Raises:
        ValueError: `format_version` is newer than this release can read.
    """

    keys_to_ignore_at_inference = ["past_key_values"]
    norm_type = "layer"  # what a family normalises with, unless its config says otherwise

    def __init__(self, format_version: int = FORMAT, **kwargs):
        if format_version > FORMAT:
            raise ValueError(
                f"format_version={format_version} was written by a newer hf_holo; this release reads up to {FORMAT}: "
                "upgrade with `pip install -U hf-holo`"
            )
        self.format_version = format_version
        super().__init__(**kwargs)

    @property
    def is_causal(self) -> bool:
        """Whether a token sees only the past: True unless `causal` is False."""
        return self.causal is not False


def check_choice(name: str, value, choices: tuple) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}")


def check_positive(**values: int) -> None:
    """Raise ValueError unless every value is an integer of at least one."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} must be a positive integer")


def check_divides(name: str, value: int, total_name: str, total: int) -> None:
    """Raise ValueError unless `value` divides `total`."""
    if total % value:
        divisors = [d for d in range(1, total + 1) if total % d == 0]
        raise ValueError(f"{name}={value} does not divide {total_name}={total}; choose one of {divisors}")
