"""Copies of results in MLflow. This is the only package that knows MLflow.

The files of the pipeline are the results. MLflow shows a copy, which can be made again from the
files at any time. A failure of MLflow therefore never ends a stage.
"""
