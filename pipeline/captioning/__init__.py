"""Synthetic captions: a captioning model of the transformers library looks at every image of the manifest."""
