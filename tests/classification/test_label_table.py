import numpy as np
import pytest

from pcrl_nnunet.classification.label_table import read_labels, read_truth
from pcrl_nnunet.errors import UserError


def write(folder, name, text):
    (folder / f"{name}.csv").write_text(text)
    return str(folder)


def test_labels_of_cases_may_be_unknown_and_occur_together(tmp_path):
    folder = write(tmp_path, "classes", "case,patient,effusion,mass\na,1,0,1\nb,1,,0\nc,2,1,\n")
    table = read_labels(folder)
    assert (table.kind, table.names, table.exclusive) == ("classes", ("effusion", "mass"), False)
    np.testing.assert_array_equal(table.value, [[0, 1], [np.nan, 0], [1, np.nan]])
    assert table.patient == {"a": "1", "b": "1", "c": "2"}
    assert table.point is None
    assert list(table.of_cases(["a", "c", "elsewhere"])) == [0, 2]


@pytest.mark.parametrize("values", ["0\n1\n2\n", "benign\nmalignant\nbenign\n", "3\n10\n3\n"])
def test_one_column_of_other_values_has_classes_that_exclude_each_other(tmp_path, values):
    lines = [f"{case},{value}" for case, value in zip("abc", values.split(), strict=True)]
    table = read_labels(write(tmp_path, "classes", "\n".join(["case,kind", *lines, "d,"])))
    assert table.exclusive
    assert table.names == tuple(sorted(set(values.split()), key=lambda v: (len(v), v)))
    assert {type(name) for name in table.names} == {str}  # a checkpoint could not load numpy's strings
    assert [table.names[i] for i in table.value[:3].argmax(1)] == values.split()
    assert np.isnan(table.value[3]).all()
    assert list(table.of_cases(list("abcd"))) == [0, 1, 2]  # d has no known label


def test_different_spellings_of_a_number_are_one_class(tmp_path):
    table = read_labels(write(tmp_path, "classes", "case,kind\na,1\nb,1.0\nc,2\nd,\n"))
    assert table.names == ("1", "2")
    np.testing.assert_array_equal(table.value[:3], [[1, 0], [1, 0], [0, 1]])


def test_a_trailing_comma_adds_no_column(tmp_path):
    table = read_labels(write(tmp_path, "classes", "case,a,\nx,1,\ny,0,\n"))
    assert table.names == ("a",)
    assert table.value.tolist() == [[1], [0]]


def test_points_are_read_as_luna_writes_them(tmp_path):
    text = "seriesuid,coordX,coordY,coordZ,class\n1.3.6,-56.08,-67.85,-311.92,0\n1.3.6,53.21,-244.41,-245.17,1\n"
    table = read_labels(write(tmp_path, "candidates", text))
    assert (table.kind, table.names, table.exclusive) == ("candidates", ("class",), False)
    np.testing.assert_array_equal(table.point, [[-56.08, -67.85, -311.92], [53.21, -244.41, -245.17]])
    assert list(table.case) == ["1.3.6", "1.3.6"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("classes", "name,a\nx,1\n", "no column case; it has name, a"),
        ("classes", "case\nx\n", "no column of a label"),
        ("classes", "case,a\n", "has no line"),
        ("classes", "case,a\nx,1\nx,0\n", "more than one line for case x"),
        ("classes", "case,a,b\nx,1,high\n", "high in column b; of several labels each is 0, 1 or empty"),
        ("classes", "case,a\nx,only\n", "1 different values in column a"),
        ("candidates", "seriesuid,coordX,coordY,coordZ,class\nx,1,2,3,0\nx,1,two,3,1\n", "no numbers in line 3"),
        (
            "candidates",
            "seriesuid,coordX,coordY,coordZ,class,patient\nx,1,2,3,0,p\nx,1,2,3,1,q\n",
            "one patient for case x",
        ),
        ("candidates", "", "cannot be read"),
        ("classes", "case,a\nx,1\ny,?\n", "'\\?' in column a; leave a cell empty"),
        ("classes", "case,a,a\nx,1,0\ny,0,0\n", "two columns are called 'a'"),
        ("classes", "case,a\nx,1,\ny,0,\n", "cannot be read .*Length of header"),
        ("classes", "case,a,\nx,1,\ny,0,1\n", "a column without a name"),
        ("classes", "case,a,b\nx,1,\ny,0,\n", "no value in column b"),
        ("classes", "case,a,Patient\nx,1,0\ny,0,1\n", "a column 'Patient'; call it patient if"),
        (
            "candidates",
            "seriesuid,coordX,coordY,coordZ,class,patient_id\nx,1,2,3,0,p\nx,1,2,3,1,p\n",
            "a column 'patient_id'; call it patient if",
        ),
        ("classes", "case,group\nx,case\ny,control\n", "class 'case', which is the name of another column"),
        ("classes", "case,a,p_a\nx,1,0\ny,0,1\n", "class 'p_a', which is the name of another column"),
        ("classes", "case,a\nx,1\ny,NA\n", "'NA' in column a; leave a cell empty where a value is unknown"),
    ],
)
def test_a_wrong_table_is_refused_with_its_fault(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message):
        read_labels(write(tmp_path, name, text))


def test_a_missing_table_and_two_tables_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no classes.csv or candidates.csv in .*nnUNet_raw"):
        read_labels(str(tmp_path))
    write(tmp_path, "classes", "case,a\nx,1\ny,0\n")
    write(tmp_path, "candidates", "seriesuid,coordX,coordY,coordZ,class\nx,1,2,3,0\n")
    with pytest.raises(UserError, match=r"has both .* pcrl.classify.table"):
        read_labels(str(tmp_path))
    assert read_labels(str(tmp_path), "candidates").kind == "candidates"


def truth_of(tmp_path, text, names, exclusive):
    (tmp_path / "truth.csv").write_text(text)
    return read_truth(str(tmp_path / "truth.csv"), names, exclusive, ["a", "b", "c"])


def test_true_labels_come_in_the_order_of_the_folds(tmp_path):
    text = "case,mass,other,effusion,patient\na,1,0,,p\nb,0,0,1,p\n"
    table = truth_of(tmp_path, text, ["effusion", "mass"], exclusive=False)
    assert table.names == ("effusion", "mass")
    np.testing.assert_array_equal(table.value, [[np.nan, 1], [1, 0]])
    assert table.patient == {"a": "p", "b": "p"}


def test_true_classes_may_lack_a_class_of_the_folds(tmp_path):
    table = truth_of(tmp_path, "case,kind\na,benign\nb,cyst\nc,\n", ["benign", "cyst", "malignant"], exclusive=True)
    np.testing.assert_array_equal(table.value, [[1, 0, 0], [0, 1, 0], [np.nan] * 3])


@pytest.mark.parametrize(
    ("text", "names", "exclusive", "message"),
    [
        ("case,mass\na,1\n", ["effusion", "mass"], False, r"has the labels mass, but .* on the labels effusion, mass;"),
        ("case,kind\na,x\nb,y\n", ["x", "z"], True, r"has the classes x, y, but the folds .* the classes x, z; give"),
        (
            "case,kind\na,x\nb,y\n",
            ["kind"],
            False,
            r"has the classes x, y, but the folds were trained on the labels kin",
        ),
        ("case,mass\nz,1\n", ["mass"], False, r"has no label of any image: it has z \.\.\., the images are a, b, c"),
    ],
)
def test_true_labels_that_do_not_fit_are_refused(tmp_path, text, names, exclusive, message):
    with pytest.raises(UserError, match=message):
        truth_of(tmp_path, text, names, exclusive)
