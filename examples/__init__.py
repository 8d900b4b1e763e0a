"""What the library looks like in use. Not part of the distribution."""
