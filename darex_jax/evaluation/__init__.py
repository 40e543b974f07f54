"""What a model is worth: metrics, output change, the search for q on real models, the demo."""
