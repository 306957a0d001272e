module github.com/c2db162c/stoppablelistener

go 1.22
