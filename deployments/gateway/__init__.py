"""The entrance: HTTP and handle calls are authenticated, bounded, translated and answered here. It decides nothing about models."""
