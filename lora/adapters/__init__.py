"""What training makes: adapters and LoRAs, and their files."""
