// What a prepared call relies on in Python's objects, and whether it still is so. Included by bindings.cpp alone.
//
// A step of a whole block is prepared once (src/nemotron_h/steps.py) and then repeated for every token. In between anybody
// may hang a hook on a module, put another module or weight in its place or change a number, so every step asks again.
// That is some hundred looks into dictionaries: 20 µs from Python with cold caches, 1 or 2 from here, where the processor
// need not wait for one look before it starts the next.
#pragma once

#include <nanobind/nanobind.h>

#include <vector>

namespace nemotron_h {

namespace nb = nanobind;

class Guard {
  public:
    // `dict[key]` is `value`.
    void same(nb::dict dict, nb::object key, nb::object value) { facts_.push_back({Kind::same, dict, key, value, 0}); }
    void absent(nb::dict dict, nb::object key) { facts_.push_back({Kind::absent, dict, key, {}, 0}); }
    // `dict[key]` is a dictionary without entries.
    void empty(nb::dict dict, nb::object key) { facts_.push_back({Kind::empty, dict, key, {}, 0}); }
    void type(nb::object object, nb::object kind) { facts_.push_back({Kind::type, object, kind, {}, 0}); }
    void attribute(nb::object object, nb::object name, nb::object value) {
        facts_.push_back({Kind::attribute, object, name, value, 0});
    }
    // A tensor keeps its address, dtype, shape and strides.
    void tensor(nb::object tensor) {
        facts_.push_back({Kind::layout, tensor, tensor.attr("shape"), tensor.attr("stride")(), 0});
        facts_.push_back({Kind::tensor, tensor, nb::str("dtype"), tensor.attr("dtype"), address_of(tensor.ptr())});
    }

    bool holds() const {
        for (const Fact& fact : facts_) {
            if (is_so(fact)) continue;
            PyErr_Clear();
            return false;
        }
        return true;
    }

    // Python's collector of cycles: a module holds its guard, and the guard its modules.
    int visit(visitproc visit, void* arg) const {
        for (const Fact& fact : facts_) {
            Py_VISIT(fact.a.ptr());
            Py_VISIT(fact.b.ptr());
            Py_VISIT(fact.c.ptr());
        }
        return 0;
    }
    void clear() {
        std::vector<Fact> gone;
        gone.swap(facts_);
    }

  private:
    enum class Kind { same, absent, empty, type, attribute, layout, tensor };
    struct Fact {
        Kind kind;
        nb::object a, b, c;
        uintptr_t address;
    };

    static bool is(PyObject* owned, const nb::object& expected) {
        Py_XDECREF(owned);  // `expected` holds another reference if it is the same
        return owned == expected.ptr();
    }

    // 0 where there is none, which no tensor with values has.
    static uintptr_t address_of(PyObject* tensor) {
        static PyObject* const name = PyUnicode_InternFromString("data_ptr");
        PyObject* const found = PyObject_CallMethodNoArgs(tensor, name);
        if (found == nullptr) return 0;
        const uintptr_t address = PyLong_AsUnsignedLongLong(found);
        Py_DECREF(found);
        return address;
    }

    static bool equal(PyObject* owned, const nb::object& expected) {
        const bool so = owned != nullptr && PyObject_RichCompareBool(owned, expected.ptr(), Py_EQ) == 1;
        Py_XDECREF(owned);
        return so;
    }

    static bool is_so(const Fact& fact) {
        PyObject *const a = fact.a.ptr(), *const b = fact.b.ptr();
        switch (fact.kind) {
            case Kind::same: return PyDict_GetItemWithError(a, b) == fact.c.ptr();
            case Kind::absent: return PyDict_GetItemWithError(a, b) == nullptr && PyErr_Occurred() == nullptr;
            case Kind::empty: {
                PyObject* const inner = PyDict_GetItemWithError(a, b);
                return inner != nullptr && PyDict_Check(inner) && PyDict_Size(inner) == 0;
            }
            case Kind::type: return reinterpret_cast<PyObject*>(Py_TYPE(a)) == b;
            case Kind::attribute: return is(PyObject_GetAttr(a, b), fact.c);
            case Kind::layout: {
                static PyObject *const shape = PyUnicode_InternFromString("shape"), *const stride = PyUnicode_InternFromString("stride");
                return equal(PyObject_GetAttr(a, shape), fact.b) && equal(PyObject_CallMethodNoArgs(a, stride), fact.c);
            }
            case Kind::tensor: return address_of(a) == fact.address && is(PyObject_GetAttr(a, b), fact.c);
        }
        return false;
    }

    std::vector<Fact> facts_;
};

inline int guard_traverse(PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    return nb::inst_ready(self) ? nb::inst_ptr<Guard>(self)->visit(visit, arg) : 0;
}

inline int guard_clear(PyObject* self) {
    if (nb::inst_ready(self)) nb::inst_ptr<Guard>(self)->clear();
    return 0;
}

inline PyType_Slot guard_slots[] = {{Py_tp_traverse, reinterpret_cast<void*>(guard_traverse)},
                                    {Py_tp_clear, reinterpret_cast<void*>(guard_clear)},
                                    {0, nullptr}};

inline void bind_guard(nb::module_& m) {
    nb::class_<Guard>(m, "Guard", "What a prepared call relies on, and whether it still is so.", nb::type_slots(guard_slots))
        .def(nb::init<>())
        .def("same", &Guard::same, nb::arg("dict"), nb::arg("key"), nb::arg("value").none())
        .def("absent", &Guard::absent)
        .def("empty", &Guard::empty)
        .def("type", &Guard::type)
        .def("attribute", &Guard::attribute)
        .def("tensor", &Guard::tensor)
        .def("holds", &Guard::holds);
}

}  // namespace nemotron_h
