"""What single heads do: their attention, measures of it, how alike they are."""
