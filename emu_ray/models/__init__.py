"""The networks: autoencoder, text encoders, U-Net, and the presets that size them. No training, no files but `from_pretrained`."""
