"""Encoded images: their headers, how they are decoded, and which way up they are."""
