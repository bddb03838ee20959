"""What is different in each family of timm's Vision Transformers."""
