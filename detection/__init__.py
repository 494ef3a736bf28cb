"""Object detection with a MobileNetV2 backbone and an SSDLite head."""
