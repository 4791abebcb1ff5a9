"""What single heads do: their attention, measures of it, and how similar they are."""
