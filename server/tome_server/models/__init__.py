"""What is served: loading, preprocessing, labels, data sets, the bundled model."""
