"""Pixel frames of a video's chunks: how many each adds, and which chunk a frame is in."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ChunkFrames:
    """Frames that a video's `first` chunk adds, and each `later` one: one less, where chunks overlap.

    Frames and chunks are counted from 0.
    """

    first: int
    later: int

    def of(self, chunk: int) -> int:
        """The frames that a chunk adds."""
        return self.later if chunk else self.first

    def before(self, chunk: int) -> int:
        """The frames of all chunks before this one."""
        return self.first + (chunk - 1) * self.later if chunk else 0

    def chunk(self, frame: int) -> int:
        """The chunk that adds a frame."""
        return 0 if frame < self.first else 1 + (frame - self.first) // self.later

    @property
    def borders(self) -> slice:
        """The borders between chunks, of the differences between neighbouring frames."""
        return slice(self.first - 1, None, self.later)

    def chunks(self, frames: int) -> int:
        """The chunks of a video of so many frames."""
        return self.chunk(frames - 1) + 1
