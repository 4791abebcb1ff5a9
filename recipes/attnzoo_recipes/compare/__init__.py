"""`attnzoo-compare`: mechanisms trained under equal conditions."""
