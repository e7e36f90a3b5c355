"""The plan of which layers always run and which may be skipped: data that can be read, edited and checked."""

from __future__ import annotations

from dataclasses import dataclass

from dysl_vla.errors import ConfigError


@dataclass(frozen=True)
class Block:
    """The dynamic layers `first` to `target - 1`; a skip at any of them jumps to `target`, which runs."""

    first: int
    target: int

    @property
    def length(self) -> int:
        """Return the number of dynamic layers."""
        return self.target - self.first


@dataclass(frozen=True)
class SkipPlan:
    """A decoder's static layers, which always run; those between two of them form a block (DySL-VLA, section 3.1).

    Attributes:
        num_layers: Depth of the decoder.
        static_layers: Indices of the static layers. Dynamic layers behind the last static one have nowhere to land, and
            always run as well.
        exits: Dynamic layers at which a block may be left, and which have an adapter and a controller; when empty, all.

    Raises:
        ConfigError: An index is out of range or named twice, no layer can be skipped, or an exit is not dynamic.
    """

    num_layers: int
    static_layers: tuple[int, ...]
    exits: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise ConfigError(f"num_layers must be at least 1, got {self.num_layers}.")
        for layer in self.static_layers:
            if not 0 <= layer < self.num_layers:
                raise ConfigError(f"static_layers must be from 0 to {self.num_layers - 1}, got {layer}.")
        if len(set(self.static_layers)) != len(self.static_layers):
            raise ConfigError(f"static_layers must name each layer once, got {list(self.static_layers)}.")
        object.__setattr__(self, "static_layers", tuple(sorted(self.static_layers)))
        if not self.blocks:
            raise ConfigError(
                f"static_layers must leave a dynamic layer before a static one, got {list(self.static_layers)}, which "
                "leaves no layer to skip."
            )
        object.__setattr__(self, "exits", tuple(sorted(set(self.exits))))
        for layer in self.exits:
            if layer not in self.dynamic_layers:
                raise ConfigError(f"exits must be of the dynamic layers {list(self.dynamic_layers)}, got {layer}.")

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Return the blocks, from the first to the last."""
        starts = (0, *(layer + 1 for layer in self.static_layers[:-1]))
        pairs = zip(starts, self.static_layers, strict=False)
        return tuple(Block(first, target) for first, target in pairs if target > first)

    @property
    def dynamic_layers(self) -> tuple[int, ...]:
        """Return the layers that can be skipped."""
        return tuple(layer for block in self.blocks for layer in range(block.first, block.target))

    def exits_of(self, block: Block) -> list[int]:
        """Return where a block may be left, which is not at the decoder's first layer, as that always runs."""
        layers = self.exits or self.dynamic_layers
        return [layer for layer in layers if max(1, block.first) <= layer < block.target]

    @property
    def first_exits(self) -> tuple[int, ...]:
        """Return where each block that may be left is left first."""
        return tuple(layers[0] for block in self.blocks if (layers := self.exits_of(block)))

    @property
    def shortest_path(self) -> tuple[int, ...]:
        """Return the layers that run when each block is left at its first exit."""
        blocks = [(layers[0], block.target) for block in self.blocks if (layers := self.exits_of(block))]
        skipped = {layer for first, target in blocks for layer in range(first, target)}
        return tuple(layer for layer in range(self.num_layers) if layer not in skipped)
