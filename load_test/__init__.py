"""Load on a running server, by Locust: `make load-test`, or `locust --config load_test/locust.conf --host URL`."""
