"""Pixel frames of a video's chunks: how many each adds, and which chunk a frame is in."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ChunkFrames:
    """Numbers of frames that a video's `first` chunk and each `later` one add; `later` is one less if chunks overlap.

    Frames and chunks are counted from 0.
    """

    first: int
    later: int

    def of(self, chunk: int) -> int:
        """The number of frames that a chunk adds."""
        return self.later if chunk else self.first

    def before(self, chunk: int) -> int:
        """The number of frames in all chunks before this one."""
        return self.first + (chunk - 1) * self.later if chunk else 0

    def chunk(self, frame: int) -> int:
        """The number of the chunk that adds a frame."""
        return 0 if frame < self.first else 1 + (frame - self.first) // self.later

    @property
    def borders(self) -> slice:
        """The slice that takes the borders between chunks from the differences between neighbouring frames."""
        return slice(self.first - 1, None, self.later)

    def chunks(self, frames: int) -> int:
        """The number of chunks in a video of so many frames."""
        return self.chunk(frames - 1) + 1
