"""Drawing step by step: requests at different steps, of different lengths, guidance and solvers share each pass of the U-Net. No Ray here."""
