/* The objects behind _core.Model and _core.State. */
#ifndef KL_PY_MODEL_H
#define KL_PY_MODEL_H

#include "binding.h"

typedef struct py_model {
    PyObject_HEAD kl_model *model;
    kl_config config;
    kl_layer *layers;       /* config.layers */
    kl_py_context *context; /* whose allocator the model's memory is from */
    Py_buffer *buffers;     /* the weights lie in these */
    Py_ssize_t n_buffers;
} py_model;

/* NULL with TypeError when it is none */
py_model *kl_py_model_of(PyObject *o);
kl_state *kl_py_state_of(PyObject *o);

PyObject *kl_py_forward(PyObject *model, PyObject *args); /* its method forward (forward.c) */

#endif
