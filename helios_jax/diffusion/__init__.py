"""What a video is made by: pure functions over named pytrees, around the networks."""
