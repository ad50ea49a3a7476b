"""Analysis of captured requests: drift, and accuracy of the answers. Free of torch."""
